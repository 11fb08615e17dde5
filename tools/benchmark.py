"""Measure what the forms of a config's model cost: training form, deployed, folded, stock."""

import argparse
import sys
from pathlib import Path

from orepa_mm.analysis.benchmark import benchmark_config
from orepa_mm.analysis.benchmark_table import print_benchmark, progress_bars
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import CheckpointError, ConfigError, DataRootError, NothingToConvertError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', nargs='?', help='checkpoint file in training form; without it weights are '
        'random, and only what is said of weight ranges depends on them')
    add('--shape', type=int, nargs=4, default=(2, 3, 416, 544), metavar=('N', 'C', 'H', 'W'),
        help='shape of the input')
    add('--rounds', type=int, default=10, help='timed rounds')
    add('--warmup', type=int, default=3, help='rounds before them that are not timed')
    add('--out', metavar='DIR', help='write benchmark.json, weight_ranges.csv and '
        'weight_ranges.png into this folder')
    args = parser.parse_args()
    if min(args.shape) < 1 or args.rounds < 1 or args.warmup < 0:
        parser.error('--shape and --rounds must be 1 at least, --warmup 0')
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f'--out must be a folder, {args.out} is none')
    return args


def main() -> int:
    args = parse_args()
    try:
        cfg = load_config(args)
        with progress_bars() as progress:
            benchmark = benchmark_config(cfg, args.checkpoint, tuple(args.shape), args.rounds,
                                         args.warmup, progress)
    except (CheckpointError, ConfigError, DataRootError, NothingToConvertError,
            FileNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print_benchmark(benchmark)
    if args.out:
        from orepa_mm.analysis.weight_range_figure import write_benchmark  # needs more packages

        for path in write_benchmark(benchmark, Path(args.out)):
            print(f'saved {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
