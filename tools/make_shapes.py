"""Generate the toy data set of the demo: three kinds of shapes, in COCO layout."""

import argparse

from orepa_mm.datasets import make_shapes_coco


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', help='folder to write')
    parser.add_argument('--train-images', type=int, default=200)
    parser.add_argument('--val-images', type=int, default=50)
    parser.add_argument('--image-size', type=int, default=256, help='in pixels')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    root = make_shapes_coco(args.root, args.train_images, args.val_images, args.image_size,
                            args.seed)
    print(f'wrote {args.train_images} training and {args.val_images} validation images to {root}')


if __name__ == '__main__':
    main()
