"""Time the OREPA backbone of a config against the stock one that it becomes, in one run."""

import argparse

import torch

from orepa_mm.deploy import benchmark_backbone
from orepa_mm.engine import add_config_arguments, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--shape', type=int, nargs=4, default=(2, 3, 416, 544),
                        metavar=('N', 'C', 'H', 'W'), help='shape of the input')
    parser.add_argument('--rounds', type=int, default=10, help='timed rounds')
    args = parser.parse_args()
    times = benchmark_backbone(load_config(args).model.backbone, tuple(args.shape), args.rounds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    print(f'{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'input {args.shape}, median of {args.rounds} rounds')
    for kind in ('training step', 'inference'):
        ours, stock = times[f'OREPA {kind}'], times[f'stock {kind}']
        print(f'{kind}: OREPA {ours:.1f} ms, stock {stock:.1f} ms, ratio {ours / stock:.2f}')


if __name__ == '__main__':
    main()
