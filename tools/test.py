"""Test a model, in training form or deployed, from any OpenMMLab config."""

import argparse

from orepa_mm.engine import (
    add_config_arguments,
    build_test_runner,
    dump_predictions,
    load_config,
    show_predictions,
    with_tta,
)
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_file, require_writable_folder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation, as the config '
                        'says; flipped images if it says nothing')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per shown image')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl, got {args.out}')
    return args


def main() -> None:
    args = parse_args()
    if args.out:
        require_writable_file(args.out)
    if args.show_dir:
        require_writable_folder(args.show_dir)
    cfg = load_config(args, splits=['test'])
    if args.show or args.show_dir:
        show_predictions(cfg, args.show_dir, args.show, args.wait_time)
    if args.tta:
        cfg = with_tta(cfg)
    runner = build_test_runner(cfg, args.checkpoint)
    if args.out:
        dump_predictions(runner, args.out)
    runner.test()


if __name__ == '__main__':
    run_tool(main)
