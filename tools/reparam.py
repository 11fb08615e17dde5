"""Re-parameterize a trained model: verify, test both forms, save the deployed one."""

import argparse
from pathlib import Path

from mmengine.dist import is_main_process

from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import run_tool
from orepa_mm.export import DEPLOYED_FORMS
from orepa_mm.files import require_writable_folder
from orepa_mm.workflow import print_report, reparameterize_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file in training form')
    add('--out', metavar='DIR', help='folder for model.pth, config.py and report.json; "deployed" '
        'beside the checkpoint by default')
    add('--form', choices=DEPLOYED_FORMS,
        help='plain (the default): the stock model, works without orepa_mm; folded: BN folded as '
        'well, loads where orepa_mm is installed')
    add('--onnx', action='store_true',
        help='write ONNX too, compared with PyTorch in ONNX Runtime')
    add('--end2end', action='store_true',
        help='write model_end2end.onnx too: one ONNX file from pixels to boxes, label maps or '
        'probabilities, compared and tested')
    add('--int8', action='store_true',
        help='write model_int8.onnx too, calibrated on training images and tested beside the '
        'float network; implies --form folded --onnx')
    add('--calibration-images', type=int, default=32, metavar='N', help='32 by default')
    add('--max-drop', type=float, metavar='X', help='largest drop of the metric by int8, e.g. '
        '0.005 for half a point of AP: layers stay in float until it is reached')
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
    if args.num_images < 1 or args.latency_rounds < 1 or args.calibration_images < 1:
        parser.error('--num-images, --latency-rounds and --calibration-images must be 1 at least')
    if args.int8 and (args.form == 'plain' or args.skip_test or args.launcher != 'none'):
        parser.error('--int8 is made of the folded form, tested on the whole test set, in one '
                     'process: leave --form plain, --skip-test and --launcher out')
    if args.max_drop is not None and not args.int8:
        parser.error('--max-drop says how much --int8 may lose: give both')
    args.form = args.form or ('folded' if args.int8 else 'plain')
    args.onnx |= args.int8
    return args


def main() -> None:
    args = parse_args()
    out = Path(args.out) if args.out else Path(args.checkpoint).parent / 'deployed'
    for folder in filter(None, (out, args.show_dir)):
        require_writable_folder(folder)
    int8 = dict(calibration_images=args.calibration_images, max_drop=args.max_drop,
                latency_rounds=args.latency_rounds) if args.int8 else None
    report = reparameterize_checkpoint(
        load_config(args, splits=['train', 'test'] if args.int8 else ['test']), args.checkpoint,
        out, form=args.form, test=not args.skip_test, onnx=args.onnx, end2end=args.end2end,
        int8=int8, safetensors=args.safetensors, save_unverified=args.save_unverified,
        tta=args.tta, show_dir=args.show_dir, num_images=args.num_images,
        latency_rounds=args.latency_rounds)
    if is_main_process():
        print_report(report, out)


if __name__ == '__main__':
    run_tool(main)
