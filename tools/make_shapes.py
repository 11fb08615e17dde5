"""Generate a toy data set of simple shapes: for detection, segmentation or classification."""

import argparse

from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_folder

LAYOUTS = {'coco': make_shapes_coco, 'cityscapes': make_shapes_cityscapes,
           'imagenet': make_shapes_imagenet}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', help='folder to write')
    parser.add_argument('--layout', choices=LAYOUTS, default='coco',
                        help='coco: boxes and polygons; cityscapes: a class for each pixel; '
                        'imagenet: one object per image, a folder for each class')
    parser.add_argument('--train-images', type=int, help='200 by default; imagenet: 1200')
    parser.add_argument('--val-images', type=int, help='50 by default; imagenet: 240')
    parser.add_argument('--image-size', type=int,
                        help='height and width in pixels; 256 by default; imagenet: 64')
    parser.add_argument('--seed', type=int, help='0 by default')
    return parser.parse_args()


def main() -> None:
    args = {key: value for key, value in vars(parse_args()).items() if value is not None}
    require_writable_folder(args['root'])
    root = LAYOUTS[args.pop('layout')](**args)
    print(f'wrote the data set to {root}')


if __name__ == '__main__':
    run_tool(main, ValueError)
