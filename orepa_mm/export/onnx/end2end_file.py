"""An end-to-end ONNX file as a model that OpenMMLab's inferencers take; all is in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CheckpointError
from .session import Session

#: The scope of each task, and what packs images there.
_TOOLBOXES = {'detection': ('mmdet', 'PackDetInputs'), 'segmentation': ('mmseg', 'PackSegInputs'),
              'classification': ('mmpretrain', 'PackInputs')}
#: What the metadata must say for images of any size, and of masks.
_RESIZING, _THRESHOLD = ('resize', 'resize_height', 'resize_width'), 'mask_threshold'


class EndToEndFile(BaseModel):
    """An end-to-end file that predicts on images of any size, which it resizes.

    It has `cfg` and `dataset_meta`, as of `load_model`, and runs on the CPU.

    Args:
        path: A file that `reparam --end2end` wrote, with pixels as input.
        preprocessor: Of the data of a test pipeline that resizes images, for subclasses.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no ONNX file, or its metadata do not say what is needed.
    """

    def __init__(self, path: str | Path, preprocessor: nn.Module | None = None) -> None:
        super().__init__(preprocessor)
        self.session = Session(Path(path))
        self.meta = meta = self.session.meta
        inputs, outputs = self.session.inputs, self.session.outputs
        needed = ['task', *(_RESIZING if preprocessor is None else ()),
                  *([_THRESHOLD] if 'masks' in outputs else ())]
        missing = [key for key in needed if key not in meta]
        if missing or 'images' not in inputs or meta['task'] not in _TOOLBOXES:
            raise CheckpointError(
                f'{path} is no file from pixels to predictions as this version of orepa_mm writes '
                f'it ({"its metadata lack " + ", ".join(missing) if missing else "other inputs"}): '
                'write it anew with `mim run orepa_mm reparam ... --end2end`')
        self.task = meta['task']
        self.height, self.width = inputs['images'][1:3]
        scope, packing = _TOOLBOXES[self.task]
        self.cfg = self._config = Config(dict(default_scope=scope, test_dataloader=dict(
            dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type=packing)]))))
        self.dataset_meta = self._dataset_meta = dataset_meta(meta)
        self.mask_head = self.mask_threshold = None
        if 'masks' in outputs:
            from mmdet.models.roi_heads.mask_heads import FCNMaskHead
            # what pastes masks that are activated, and of the box's label
            self.mask_head = FCNMaskHead(num_convs=0, in_channels=1, conv_out_channels=1,
                                         num_classes=1, class_agnostic=True)
            self.mask_threshold = float(meta[_THRESHOLD])

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor], data_samples: list, mode: str = 'predict'
                ) -> list[Any]:
        """Predict on images as they are in their files.

        Args:
            inputs: `(3, h, w)` each, in 8 bits; blue, green, red.
            data_samples: Of the images, filled in place.
            mode: `predict`, which is all that such a file does.

        Returns:
            The data samples, with predictions in pixels of the images.
        """
        canvas = torch.zeros(len(inputs), self.height, self.width, 3, dtype=torch.uint8)
        for image, sample, place in zip(inputs, data_samples, canvas):
            pixels, resized = placed(image.permute(1, 2, 0).cpu().numpy(), self.meta)
            height, width = pixels.shape[:2]
            place[:height, :width] = torch.from_numpy(pixels)
            original = tuple(image.shape[1:])
            sample.set_metainfo({
                'ori_shape': original, 'img_shape': (height, width),
                'scale_factor': (resized[1] / original[1], resized[0] / original[0])})
        if self.meta.get('channel_order') == 'rgb':
            canvas = canvas.flip(-1)
        sizes = torch.tensor([sample.img_shape for sample in data_samples])
        return self.filled(self.run(canvas, sizes), data_samples)

    def run(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """What the file says.

        Args:
            pixels: In 8 bits, `(N, H, W, 3)`, channels in the file's order.
            sizes: Height and width of each image in it, `(N, 2)`.

        Returns:
            The file's outputs.
        """
        feed = {'images': pixels.contiguous(), 'sizes': sizes}
        return self.session([feed[name] for name in self.session.inputs])

    def filled(self, found: Mapping[str, Tensor], samples: list) -> list[Any]:
        """Data samples with predictions in pixels of the original images.

        Args:
            found: The file's outputs.
            samples: Of the images, filled in place.
        """
        if self.task == 'classification':
            for sample, scores in zip(samples, found['probabilities']):
                sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))
        elif self.task == 'segmentation':
            for sample, labels in zip(samples, found['label_map']):
                height, width = sample.img_shape
                labels = F.interpolate(labels[None, None, :height, :width].float(),
                                       sample.ori_shape, mode='nearest-exact')
                sample.pred_sem_seg = PixelData(data=labels[0].long())
        else:
            for sample, instances in zip(samples, self.instances(found, samples, True)):
                sample.pred_instances = instances
        return samples

    def instances(self, found: Mapping[str, Tensor], samples: list, rescale: bool,
                  mask_threshold: float | None = None) -> list[InstanceData]:
        """MMDetection's instances of each image.

        Args:
            found: The file's outputs.
            samples: Of the images.
            rescale: Whether boxes are in pixels of the original image; else of the input.
            mask_threshold: Of the masks' probabilities, if another than the config's; negative:
                masks are probabilities, 0 to 255, as of MMDetection's `mask_thr_binary`.
        """
        results = []
        threshold = self.mask_threshold if mask_threshold is None else mask_threshold
        for image, sample in enumerate(samples):
            count = int(found['count'][image])
            boxes = found['boxes'][image, :count].clone()
            one = InstanceData(scores=found['scores'][image, :count],
                               labels=found['labels'][image, :count])
            if self.mask_head is not None:
                masks = found['masks'][image, :count, None]
                one.masks = self.mask_head._predict_by_feat_single(
                    masks.numpy(), boxes.clone(), one.labels, sample.metainfo,
                    ConfigDict(mask_thr_binary=threshold), rescale, True) if count else torch.zeros(
                        0, *(sample.ori_shape if rescale else sample.img_shape)[:2],
                        dtype=torch.bool if threshold >= 0 else torch.uint8)
            if rescale:
                boxes /= boxes.new_tensor(sample.scale_factor).repeat(1, 2)
            one.bboxes = boxes
            results.append(one)
        return results


def placed(image: np.ndarray, meta: Mapping[str, str]) -> tuple[np.ndarray, tuple[int, int]]:
    """An image as an end-to-end file takes it, to be put at the top left of the input.

    Args:
        image: `(h, w, 3)`.
        meta: The file's metadata: `resize`, and the sizes that it needs, see `resizing`.

    Returns:
        Its pixels, and the height and width to which all of the image was resized.
    """
    height, width = image.shape[:2]
    bounds = int(meta['resize_height']), int(meta['resize_width'])
    how, size = meta['resize'], bounds
    if how == 'fit':  # rounded as by MMCV
        factor = min(bounds[0] / height, bounds[1] / width)
        size = int(height * factor + 0.5), int(width * factor + 0.5)
    elif how == 'crop':  # and as by MMPretrain
        short = int(meta['short_edge'])
        size = (int(short * height / min(height, width)), int(short * width / min(height, width)))
    size = max(1, size[0]), max(1, size[1])
    pixels = mmcv.imresize(image, size[::-1])
    top, left = (max(0, round((length - bound) / 2)) for length, bound in zip(size, bounds))
    return pixels[top:top + bounds[0], left:left + bounds[1]], size


def dataset_meta(meta: Mapping[str, str]) -> dict[str, Any]:
    """Classes and colours, as an ONNX file says them.

    Args:
        meta: The file's metadata.
    """
    return {key: json.loads(meta[key]) for key in ('classes', 'palette') if key in meta}
