"""Predict on an image: onnx_predict.py model_end2end.onnx image.jpg [--out drawn.png]"""
import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

parser = argparse.ArgumentParser(description=__doc__)
for name in ('model', 'image', '--out'):
    parser.add_argument(name)
args = parser.parse_args()
session = onnxruntime.InferenceSession(args.model, providers=['CPUExecutionProvider'])
meta = session.get_modelmeta().custom_metadata_map
classes = json.loads(meta['classes'])
image = Image.open(args.image).convert('RGB')
whole = int(meta['resize_width']), int(meta['resize_height'])
scale = {'fit': np.divide(whole, image.size).min(), 'stretch': np.divide(whole, image.size),
         'crop': int(meta.get('short_edge', 0)) / min(image.size)}[meta['resize']]
size = tuple((np.multiply(image.size, scale) + 0.5).astype(int).tolist())
corner = tuple(np.minimum(0, np.subtract(whole, size) // 2).tolist())
canvas = Image.new('RGB', session.get_inputs()[0].shape[2:0:-1])  # width, height
canvas.paste(image.resize(size, Image.Resampling.BILINEAR), corner)
pixels = np.array(canvas)[None, :, :, ::1 if meta['channel_order'] == 'rgb' else -1]
feed = {'images': pixels.copy(), 'sizes': np.array([size[::-1]], np.int64)}
arrays = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
found = {value.name: array for value, array in zip(session.get_outputs(), arrays)}
for i in range(found.get('count', [0])[0]):  # pixels of the original image
    box = found['boxes'][0, i] * np.tile(np.array(image.size) / size, 2)
    print(classes[found['labels'][0, i]], f"{found['scores'][0, i]:.3f}", *box.round(1).tolist())
    if found['scores'][0, i] > 0.3:
        ImageDraw.Draw(image).rectangle(box.tolist(), outline='red', width=2)
for i in np.argsort(found['probabilities'][0])[:-6:-1] if 'probabilities' in found else ():
    print(classes[i], f"{found['probabilities'][0, i]:.3f}")
if 'label_map' in found:
    labels = Image.fromarray(found['label_map'][0, :size[1], :size[0]].astype(np.uint8))
    image = labels.resize(image.size, Image.Resampling.NEAREST)
    print('classes in the image:', *(classes[i] for i in np.unique(image)))
if args.out:
    image.save(args.out)
