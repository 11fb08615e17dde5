"""Train a model from any OpenMMLab config."""

import argparse

from orepa_mm.engine import (
    add_config_arguments,
    build_runner,
    load_config,
    use_training_options,
)
from orepa_mm.errors import run_tool
from orepa_mm.workflow.dry_run import dry_run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--amp', action='store_true',
                        help='train in automatic mixed precision (needs a GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or from the latest in the work folder')
    parser.add_argument('--dry-run', type=int, metavar='N', help='try everything that a run does '
                        'with N iterations, from the first batch to the deployed form, and keep '
                        'nothing; exit code 1 if a step fails')
    args = parser.parse_args()
    if args.dry_run is not None:
        if args.dry_run < 1:
            parser.error('--dry-run must be 1 at least')
        if args.resume is not None or args.launcher != 'none':
            parser.error('--dry-run starts anew, in one process: leave --resume and --launcher '
                         'out')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    use_training_options(cfg, amp=args.amp, auto_scale_lr=args.auto_scale_lr, resume=args.resume)
    if args.dry_run is not None:
        dry_run(cfg, args.dry_run, say=lambda line: print(line, flush=True))
    else:
        build_runner(cfg).train()


if __name__ == '__main__':
    run_tool(main)
