"""Train a model from any OpenMMLab config."""

import argparse
import sys

from orepa_mm.engine import add_config_arguments, build_runner, check_pretrained, load_config
from orepa_mm.errors import CheckpointError, ConfigError, DataRootError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--amp', action='store_true',
                        help='train in automatic mixed precision (needs a GPU)')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or from the latest in the work folder')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        cfg = load_config(args)
        check_pretrained(cfg)
    except (DataRootError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            sys.exit('error: --auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    try:
        build_runner(cfg).train()
    except (CheckpointError, ConfigError) as error:  # of load_from, init_cfg, resume; of a hook
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
