"""Convert an ImageNet checkpoint: to our training form, from the authors' or from a plain one; or
from training form to deploy form."""

import argparse

from orepa_mm.checkpoints import PUBLISHED
from orepa_mm.errors import run_tool
from orepa_mm.export import CONVERTED_FORMS, convert_checkpoint_file
from orepa_mm.files import require_writable_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='checkpoint in training form: a file of the OREPA authors '
                        '(ResNet, ResNeXt, RepVGG), or of a classifier that was trained with '
                        'a backbone of this package. With --to training also a plain ResNet or '
                        'ResNeXt of torchvision, timm or OpenMMLab, which is expanded: it '
                        'computes the same, and has branches to be trained on')
    parser.add_argument('target', help='file to write; nothing is overwritten')
    parser.add_argument('--arch', metavar='NAME', help='stop if the source does not hold this '
                        f'network: {", ".join(PUBLISHED)}')
    parser.add_argument('--to', choices=CONVERTED_FORMS, default='training',
                        help='training (default): backbone.* and head.fc.* for init_cfg of type '
                        "Pretrained; deploy: re-parameterized, OpenMMLab's plain names; "
                        "torchvision: re-parameterized, torchvision's names")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_writable_file(args.target)
    written = convert_checkpoint_file(args.source, args.target, args.arch, args.to)
    print(f'wrote {args.target}: {written.architecture.name}, {written.form} form, '
          f'{written.num_tensors} tensors'
          + f', {written.expanded} plain convolutions expanded' * bool(written.expanded))
    if args.to == 'training':
        print(f'use it in a config, in the backbone of type {written.architecture.backbone["type"]}'
              f":\n  init_cfg=dict(type='Pretrained', checkpoint={args.target!r}, "
              "prefix='backbone.')")


if __name__ == '__main__':
    run_tool(main)
