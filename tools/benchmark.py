"""Measure what the forms of a model cost: training form, deployed, stock, and others' ways."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from orepa_mm.analysis import run_cost, training_cost
from orepa_mm.analysis.benchmark import benchmark_config
from orepa_mm.analysis.benchmark_table import print_benchmark, progress_bars
from orepa_mm.analysis.cost_table import (
    fill_markdown,
    gather_tables,
    print_measurement,
    write_measurement,
)
from orepa_mm.analysis.training_cost import Settings
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_folder

#: Sub-command that a config alone stands for: `benchmark.py CONFIG [CHECKPOINT]`.
DEFAULT = 'forms'
#: Sub-commands over random ResNet-50 backbones.
NETWORKS = {
    'squeeze': (training_cost.measure_squeeze,
                'squeeze all layers of a ResNet-50, forward and backward'),
    'step': (training_cost.measure_step, 'training step of a backbone, nothing frozen'),
    'memory': (training_cost.measure_memory, 'memory of a training step, and its floor'),
    'latency': (training_cost.measure_latency, 'forward pass of a backbone in eval mode'),
}
#: Sub-commands over a config.
CONFIGS = {
    'convert': (run_cost.measure_convert, 'load, squeeze and save: time and peak memory'),
    'optimizer': (run_cost.measure_optimizer, 'groups, operations and time of optimizer.step()'),
}


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog='A config in place of a command stands for '
        f'`{DEFAULT} CONFIG`. COMMAND --help says more.')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    def command(name: str, what: str, run: Callable[[argparse.Namespace], int]
                ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=f'{what[0].upper()}{what[1:]}.')
        sub.set_defaults(run=run)
        return sub

    sub = command(DEFAULT, 'one table of all forms of a config: parameters, latency, step, '
                  'weight ranges', run_forms)
    add_config_arguments(sub)
    sub.add_argument('checkpoint', nargs='?', help='checkpoint file in training form; without it '
                     'weights are random, and only what is said of weight ranges depends on them')
    add_shape(sub)
    add_rounds(sub)
    sub.add_argument('--out', metavar='DIR', help='write benchmark.json, weight_ranges.csv and '
                     'weight_ranges.png into this folder')
    for name, (measure, what) in NETWORKS.items():
        sub = command(name, what, lambda args, measure=measure: run_networks(args, measure))
        add_shape(sub)
        add_rounds(sub)
        sub.add_argument('--base-channels', type=int, default=64, help='width of the first stage')
        sub.add_argument('--threads', type=int, help='threads of the CPU')
        sub.add_argument('--launch-bound', action='store_true', help='8 channels, 2 x 3 x 64 x 64, '
                         'one thread: what is felt is the number of operations')
        add_output(sub)
    sub = command('config-step', "training step of a config's whole network", run_config_step)
    add_config_arguments(sub)
    add_shape(sub)
    add_rounds(sub)
    add_output(sub)
    for name, (measure, what) in CONFIGS.items():
        sub = command(name, what, lambda args, measure=measure: run_config(args, measure))
        add_config_arguments(sub)
        add_rounds(sub)
        add_output(sub)
    sub = command('theory', 'what squeezing a ResNet-50 must compute: formulas, nothing is run',
                  lambda args: finish(run_cost.squeeze_theory(), args))
    add_output(sub)
    sub = command('tables', 'gather the tables of a folder in one Markdown file', run_tables)
    sub.add_argument('folder', help='the --out of other commands; benchmark.md is written there')
    sub.add_argument('--into', metavar='FILE', help='write them between the two marks '
                     '`<!-- measured: ... -->` of this Markdown file as well')
    # the first argument is a command, or else the config of the default one
    if not arguments or arguments[0] not in (*commands.choices, '-h', '--help'):
        arguments = [DEFAULT, *arguments]
    args = parser.parse_args(arguments)
    shape, rounds = getattr(args, 'shape', (1,)), getattr(args, 'rounds', 1)
    numbers = (*shape, rounds, getattr(args, 'base_channels', 1), getattr(args, 'threads', 1) or 1)
    if min(numbers) < 1 or getattr(args, 'warmup', 0) < 0:
        parser.error('--shape, --rounds, --base-channels and --threads must be 1 at least, '
                     '--warmup 0')
    return args


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--shape', type=int, nargs=4, default=(2, 3, 416, 544),
                        metavar=('N', 'C', 'H', 'W'), help='shape of the input')


def add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--rounds', type=int, default=10, help='timed rounds')
    parser.add_argument('--warmup', type=int, default=3, help='rounds before them that are not '
                        'timed')


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--out', metavar='DIR', help='write the table as JSON and Markdown into '
                        'this folder')
    parser.add_argument('--plot', action='store_true', help='draw time and memory as well; needs '
                        '--out')


def run_forms(args: argparse.Namespace) -> int:
    cfg = load_config(args, splits=())
    with progress_bars() as progress:
        benchmark = benchmark_config(cfg, args.checkpoint, tuple(args.shape), args.rounds,
                                     args.warmup, progress)
    print_benchmark(benchmark)
    if args.out:
        from orepa_mm.analysis.weight_range_figure import write_benchmark  # needs more packages

        for path in write_benchmark(benchmark, Path(args.out)):
            print(f'saved {path}')
    return 0


def run_networks(args: argparse.Namespace, measure: Callable) -> int:
    settings = (Settings.launch_bound(args.rounds, args.warmup) if args.launch_bound else
                Settings(tuple(args.shape), args.base_channels, args.rounds, args.warmup,
                         args.threads))
    with progress_bars() as progress:
        measurement = measure(settings, progress)
    return finish(measurement, args)


def run_config_step(args: argparse.Namespace) -> int:
    settings = Settings(tuple(args.shape), rounds=args.rounds, warmup=args.warmup)
    with progress_bars() as progress:
        measurement = training_cost.measure_config_step(load_config(args, splits=()), settings,
                                                        progress)
    return finish(measurement, args)


def run_config(args: argparse.Namespace, measure: Callable) -> int:
    with progress_bars() as progress:
        measurement = measure(load_config(args, splits=()), args.rounds, args.warmup, progress)
    return finish(measurement, args)


def finish(measurement: 'training_cost.Measurement', args: argparse.Namespace) -> int:
    print_measurement(measurement)
    if args.out:
        for path in write_measurement(measurement, args.out, args.plot):
            print(f'saved {path}')
    return 0


def run_tables(args: argparse.Namespace) -> int:
    print(f'saved {gather_tables(args.folder)}')
    if args.into:
        print(f'saved {fill_markdown(args.folder, args.into)}')
    return 0


def main() -> int:
    args = parse_args(sys.argv[1:])
    if getattr(args, 'out', None):
        require_writable_folder(args.out)
    return args.run(args)


if __name__ == '__main__':
    run_tool(main)
