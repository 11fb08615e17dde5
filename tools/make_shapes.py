"""Generate a toy data set of simple shapes: for detection, segmentation or classification."""

import argparse
import sys

from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet

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


def main() -> int:
    args = {key: value for key, value in vars(parse_args()).items() if value is not None}
    try:
        root = LAYOUTS[args.pop('layout')](**args)
    except (ValueError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'wrote the data set to {root}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
