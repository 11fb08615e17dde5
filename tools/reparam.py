"""Re-parameterize a trained model: verify, test both forms, save the deployed one."""

import argparse
import sys
from pathlib import Path

from orepa_mm.checkpoints import CheckpointError
from orepa_mm.datasets import DataRootError
from orepa_mm.deploy import (
    NothingToConvertError,
    VerificationError,
    print_report,
    reparameterize_checkpoint,
)
from orepa_mm.engine import add_config_arguments, load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file in training form')
    parser.add_argument('--out', help='folder for model.pth, config.py and report.json; '
                        '"deployed" beside the checkpoint by default')
    parser.add_argument('--skip-test', action='store_true',
                        help='compare raw outputs only, do not test on the whole test set')
    parser.add_argument('--num-images', type=int, default=4,
                        help='test images on which raw outputs are compared')
    parser.add_argument('--latency-rounds', type=int, default=20,
                        help='timed forward passes of each form')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    out = Path(args.out) if args.out else Path(args.checkpoint).parent / 'deployed'
    try:
        report = reparameterize_checkpoint(load_config(args), args.checkpoint, out,
                                           not args.skip_test, args.num_images,
                                           args.latency_rounds)
    except (CheckpointError, DataRootError, NothingToConvertError, VerificationError,
            FileNotFoundError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print_report(report)
    print(f'saved {out / "model.pth"} and {out / "config.py"}: the stock model, which tests '
          f'without orepa_mm:\n  mim test {report["package"]} {out / "config.py"} --checkpoint '
          f'{out / "model.pth"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
