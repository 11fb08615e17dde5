"""Predict on images and videos: draws boxes, masks, label maps or classes, and writes JSON."""

import argparse
import sys
from pathlib import Path

from mmengine.device import get_device

from orepa_mm.engine import SettingsAction, load_config
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_folder
from orepa_mm.workflow import load_model, load_onnx, predict, split_model_arguments


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage='%(prog)s MODEL_DIR | ONNX_FILE | CONFIG CHECKPOINT  IMAGES... --out DIR [options]')
    add = parser.add_argument
    add('words', nargs='+', metavar='MODEL IMAGES',
        help='a folder that reparam wrote; or an ONNX file that it wrote (model_end2end.onnx, '
        'model.onnx, model_int8.onnx), which is enough by itself; or a config (file, or the name '
        'of one of orepa_mm; best the one that the run wrote into its work folder) and its '
        'checkpoint. Then images, folders, patterns such as "data/*.jpg", videos')
    add('--out', metavar='DIR', required=True, help='folder to write; nothing is overwritten')
    add('--batch-size', type=int, default=1, help='images that the model gets at once')
    add('--score-thr', type=float, default=0.3,
        help='detections whose score is not above it are neither drawn nor written; 0.3 by default')
    add('--top-k', type=int, default=5, help='classes that a classifier names; 5 by default')
    add('--device', help=f'{get_device()} by default; ONNX files run on the CPU')
    add('--no-draw', action='store_true', help='write JSON and label maps only')
    add('--data-root', help='as for training; for a config that was trained with it')
    add('--cfg-options', nargs='+', action=SettingsAction, metavar='KEY=VALUE',
        help='override settings of the config')
    parser.set_defaults(launcher='none', local_rank=0, work_dir=None)
    args = parser.parse_intermixed_args()
    args.onnx = Path(args.words[0]).suffix == '.onnx'
    if args.onnx and (args.device not in (None, 'cpu') or args.data_root or args.cfg_options):
        parser.error('an ONNX file brings its config and runs on the CPU: leave --device, '
                     '--data-root and --cfg-options out')
    if args.batch_size < 1 or args.top_k < 1:
        parser.error('--batch-size and --top-k must be 1 at least')
    return args


def main() -> int:
    args = parse_args()
    require_writable_folder(args.out)
    if args.onnx:
        model, images = load_onnx(args.words[0]), args.words[1:]
    else:
        args.config, checkpoint, images = split_model_arguments(args.words)
        model = load_model(load_config(args, splits=()), checkpoint, args.device or get_device())
    done = predict(model, images, args.out, batch_size=args.batch_size, score_thr=args.score_thr,
                   top_k=args.top_k, draw=not args.no_draw)
    for line in done.skipped:
        print(f'skipped {line}', file=sys.stderr)
    print(f'predicted on {done.count} images, wrote {args.out}')
    return 1 if done.skipped else 0


if __name__ == '__main__':
    run_tool(main)
