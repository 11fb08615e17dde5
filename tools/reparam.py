"""Re-parameterize a trained model: verify, test both forms, save the deployed one."""

import argparse
import sys
from pathlib import Path

from mmengine.dist import is_main_process

from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import (
    CheckpointError,
    ConfigError,
    DataRootError,
    NothingToConvertError,
    OnnxExportError,
    VerificationError,
)
from orepa_mm.export import DEPLOYED_FORMS
from orepa_mm.workflow import print_report, reparameterize_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file in training form')
    add('--out', metavar='DIR', help='folder for model.pth, config.py and report.json; "deployed" '
        'beside the checkpoint by default')
    add('--form', choices=DEPLOYED_FORMS, default='plain',
        help='plain: the stock model, works without orepa_mm; folded: BN folded as well, loads '
        'where orepa_mm is installed')
    add('--onnx', action='store_true',
        help='write ONNX too, compared with PyTorch in ONNX Runtime')
    add('--safetensors', action='store_true', help='write model.safetensors too')
    add('--skip-test', action='store_true',
        help='compare raw outputs only, do not test on the whole test set')
    add('--save-unverified', action='store_true',
        help='save even if the two forms differ; the checkpoint says so')
    add('--tta', action='store_true', help='test with test-time augmentation, as the config says; '
        'flipped images if it says nothing')
    add('--show-dir', help="draw the deployed form's predictions into this folder")
    add('--num-images', type=int, default=4, help='test images on which raw outputs are compared')
    add('--latency-rounds', type=int, default=20, help='timed forward passes of each form')
    args = parser.parse_args()
    if args.skip_test and (args.tta or args.show_dir):
        parser.error('--skip-test leaves nothing for --tta and --show-dir to do')
    if args.num_images < 1 or args.latency_rounds < 1:
        parser.error('--num-images and --latency-rounds must be 1 at least')
    return args


def main() -> int:
    args = parse_args()
    out = Path(args.out) if args.out else Path(args.checkpoint).parent / 'deployed'
    try:
        report = reparameterize_checkpoint(
            load_config(args, splits=['test']), args.checkpoint, out, form=args.form,
            test=not args.skip_test, onnx=args.onnx, safetensors=args.safetensors,
            save_unverified=args.save_unverified, tta=args.tta, show_dir=args.show_dir,
            num_images=args.num_images, latency_rounds=args.latency_rounds)
    except (CheckpointError, ConfigError, DataRootError, NothingToConvertError, OnnxExportError,
            VerificationError, ImportError, FileNotFoundError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    if is_main_process():
        print_report(report, out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
