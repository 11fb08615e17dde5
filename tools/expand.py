"""Expand a trained plain checkpoint: the same function in training form, to train on with OREPA."""

import argparse
import shlex

from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_file
from orepa_mm.workflow import expand_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add('checkpoint', help="checkpoint of the plain model: the config's without OREPA")
    add('out', help='file to write; nothing is overwritten')
    add('--num-images', type=int, default=4, help='test images on which the forms are compared')
    add('--no-images', action='store_true',
        help='compare on random noise: no data set is needed; the checkpoint says so')
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error('--num-images must be 1 at least')
    if args.launcher != 'none':
        parser.error('this runs in one process: leave --launcher out')
    return args


def main() -> None:
    args = parse_args()
    require_writable_file(args.out)
    cfg = load_config(args)
    done = expand_checkpoint(cfg, args.checkpoint, args.out, num_images=args.num_images,
                             images=not args.no_images)
    differences = ', '.join(f'{value:.1e} (raw outputs in {name})' if name == 'float32' else
                            f'{value:.1e} ({name})'
                            for name, value in done.meta['largest_difference'].items())
    print(f'wrote {args.out}: {done.expanded} convolutions expanded, {done.copied} tensors copied\n'
          f'verified on {done.meta["verified_on"]}: largest scale-relative differences '
          f'{differences}')
    if not done.verification.complete:
        print(f'note: {done.verification.explain()}')
    # the weights to start from are in the checkpoint now
    options = [f'load_from={args.out}', *(
        ['model.backbone.init_cfg=None'] if (cfg.model.get('backbone') or {}).get('init_cfg')
        else [])]
    print('train on:\n  mim train orepa_mm', shlex.join([args.config, '--cfg-options', *options]))


if __name__ == '__main__':
    run_tool(main)
