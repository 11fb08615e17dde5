"""Writes a set in COCO layout in other formats, by plain code that shares nothing with readers."""

import json
import shutil


def read_split(root, split):
    """Categories, and (image file, entry of the image, its annotations) for each image."""
    content = json.loads((root / 'annotations' / f'instances_{split}2017.json').read_text())
    annotations = {image['id']: [] for image in content['images']}
    for annotation in content['annotations']:
        annotations[annotation['image_id']].append(annotation)
    return content['categories'], [
        (root / f'{split}2017' / image['file_name'], image, annotations[image['id']])
        for image in content['images']]


def write_yolo(coco, root, outlines=False):
    for split in ('train', 'val'):
        categories, images = read_split(coco, split)
        numbers = {category['id']: i for i, category in enumerate(categories)}
        for file, image, annotations in images:
            for kind in ('images', 'labels'):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / 'images' / split)
            size, rows = (image['width'], image['height']), []
            for annotation in annotations:
                x, y, w, h = annotation['bbox']
                values = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
                if outlines:
                    outline, = annotation['segmentation']
                    values = [value / size[i % 2] for i, value in enumerate(outline)]
                rows.append(' '.join([str(numbers[annotation['category_id']]),
                                      *(f'{value:.6f}' for value in values)]))
            path = root / 'labels' / split / f'{file.stem}.txt'
            path.write_text(''.join(f'{row}\n' for row in rows))
    names = ''.join(f'  {i}: {category["name"]}\n' for i, category in enumerate(categories))
    (root / 'data.yaml').write_text(f'path: .\ntrain: images/train\nval: images/val\n'
                                    f'test:  # optional\nnames:\n{names}')
    return root


def write_voc(coco, root):
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / name).mkdir(parents=True)
    for split in ('train', 'val'):
        categories, images = read_split(coco, split)
        names, ids = {category['id']: category['name'] for category in categories}, []
        for file, image, annotations in images:
            ids.append(f'{split}_{file.stem}')
            shutil.copy(file, root / 'JPEGImages' / f'{ids[-1]}{file.suffix}')
            objects = ''
            for annotation in annotations:
                x, y, w, h = annotation['bbox']
                objects += (
                    f'<object><name>{names[annotation["category_id"]]}</name><pose>Left</pose>'
                    f'<truncated>0</truncated><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>'
                    f'<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>'
                    '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>'
                    '<ymax>2</ymax></bndbox></part></object>')
            (root / 'Annotations' / f'{ids[-1]}.xml').write_text(
                f'<annotation><filename>{file.name}</filename><size><width>{image["width"]}'
                f'</width><height>{image["height"]}</height><depth>3</depth></size>{objects}'
                '</annotation>')
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(ids) + '\n')
    return root
