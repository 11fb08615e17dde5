"""Check a config's data: what would stop a run, or make what it says wrong."""

import argparse

from orepa_mm.analysis.benchmark_table import progress_bars
from orepa_mm.datasets import SPLITS
from orepa_mm.datasets.check import check_data
from orepa_mm.datasets.check_report import print_check, save_check
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog='exit code: 0 if there is nothing '
                                     'but notes, 1 otherwise')
    add_config_arguments(parser)
    add = parser.add_argument
    add('--splits', nargs='+', choices=SPLITS, default=list(SPLITS),
        help='check only these; a folder to test on needs no more than test')
    add('--max-images', type=int, metavar='N', help='open at most N images of each data set, '
        'spread evenly; 0: none, annotations and file names only')
    add('--json', metavar='FILE', help='write what was found, with all names, to this file')
    args = parser.parse_args()
    if args.max_images is not None and args.max_images < 0:
        parser.error('--max-images must be 0 at least')
    if args.launcher != 'none':
        parser.error('this runs in one process: leave --launcher out')
    return args


def main() -> int:
    args = parse_args()
    if args.json:
        require_writable_file(args.json)
    cfg = load_config(args, args.splits, check=False)
    with progress_bars() as progress:
        check = check_data(cfg, args.splits, args.max_images, progress)
    if args.json:
        save_check(check, args.json)
    print_check(check, cfg.get('data_root'))
    return 0 if check.passed else 1


if __name__ == '__main__':
    run_tool(main)
