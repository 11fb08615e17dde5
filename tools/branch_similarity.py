"""Say what the branches of a trained model do: how alike they are, and what each adds."""

import argparse
from pathlib import Path

from orepa_mm.analysis.similarity import measure_checkpoint, print_branches
from orepa_mm.analysis.similarity_figure import write_branches
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_folder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file in training form')
    add('--out', metavar='DIR', help='write branch_similarity.json, branch_similarity.md, '
        'similarity.png (heat maps) and shares.png into this folder')
    args = parser.parse_args()
    if args.launcher != 'none':
        parser.error('this runs in one process: leave --launcher out')
    return args


def main() -> None:
    args = parse_args()
    if args.out:
        require_writable_folder(args.out)
    layers = measure_checkpoint(load_config(args, splits=()), args.checkpoint)
    print_branches(layers)
    if args.out:
        title = f'{Path(args.config).stem}: {Path(args.checkpoint).name}'
        for path in write_branches(layers, args.out, title):
            print(f'saved {path}')


if __name__ == '__main__':
    run_tool(main)
