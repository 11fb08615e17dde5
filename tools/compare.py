"""Train variants of a config over several seeds, and say what differs by more than chance."""

import argparse
import signal
import sys
from pathlib import Path

from orepa_mm.analysis.variants import VARIANTS, Variant
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_file, require_writable_folder
from orepa_mm.workflow.comparison import execute, plan_runs
from orepa_mm.workflow.comparison_report import (
    fill_document,
    require_place,
    write_comparison,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='variants:\n' + '\n'.join(f'  {name:8}{what}' for name, what in VARIANTS.items())
        + '\n\nbehind a colon options follow, separated by commas: lr=RATE, settings of the '
        'config by their\nnames with dots, load_from=FILE, or what conv_cfg of OREPA takes:\n'
        '  plain:lr=1e-3  orepa:lr=5e-4,single_init  orepa:model.backbone.frozen_stages=1\n\n'
        'The same command goes on where it was interrupted; more seeds or variants add to it.')
    add_config_arguments(parser)
    add = parser.add_argument
    add('--variants', nargs='+', default=['plain', 'orepa'], metavar='VARIANT',
        help='what to compare, see below; plain orepa by default')
    add('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N', help='0 1 2 by default')
    add('--out', required=True, metavar='DIR', help='folder for the runs and the report')
    add('--plain-checkpoint', metavar='FILE', help='what plain and expand start from: a plain '
        'classifier, whose backbone is taken, or the whole plain model')
    add('--parallel', type=int, default=1, metavar='N',
        help='runs at once; they share the cores, and take turns on the GPUs')
    add('--metric', metavar='NAME', help='what to compare by; the one that the config saves the '
        'best by, or the first')
    add('--into', metavar='FILE', help='write the tables into this Markdown file as well, between '
        'two lines `<!-- comparison NAME: begin -->` and `... end -->`; NAME is that of --out')
    add('--reference', metavar='VARIANT', help='what the others are compared with; the first')
    args = parser.parse_args()
    if args.parallel < 1:
        parser.error('--parallel must be 1 at least')
    if args.work_dir is not None:
        parser.error('--work-dir is not used here: everything goes into --out')
    if args.launcher != 'none':
        parser.error('--launcher is not used here: each run is one process; see --parallel')
    if args.reference is not None and args.reference not in args.variants:
        parser.error(f'--reference {args.reference} is not among --variants')
    return args


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its processes end with it
    require_writable_folder(args.out)
    if args.into:
        require_writable_file(args.into)
        require_place(args.out, args.into)
    try:
        runs = plan_runs(load_config(args), [Variant.parse(text) for text in args.variants],
                         args.seeds, args.out, args.plain_checkpoint,
                         title=Path(args.config).stem)
        failed = execute(runs, args.parallel, say=lambda line: print(line, flush=True))
        comparison = write_comparison(args.out, args.metric, args.reference)
        if args.into:
            fill_document(args.out, args.into)
    except KeyboardInterrupt:
        print('\nstopped; the same command goes on from here', file=sys.stderr)
        return 130
    for pair in comparison.pairs:
        print(f'{comparison.metric}: {pair.sentence}')
    print(f'saved {Path(args.out) / "report.html"}, comparison.md and comparison.json')
    return 1 if failed else 0


if __name__ == '__main__':
    run_tool(main)
