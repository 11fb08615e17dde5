"""Convert an ImageNet checkpoint of the OREPA authors (ResNet, ResNeXt) to our names."""

import argparse
import sys
from pathlib import Path

from orepa_mm.checkpoints import CheckpointError, convert_checkpoint_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help="the authors' file, in training form")
    parser.add_argument('target', type=Path, help='file to write: an image classifier with '
                        'backbone.* and head.fc.*, for init_cfg of type Pretrained')
    args = parser.parse_args()
    try:
        count = convert_checkpoint_file(args.source, args.target)
    except (CheckpointError, FileNotFoundError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'wrote {count} tensors to {args.target}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
