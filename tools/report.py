"""Write the report of a run: curves, detections of both forms, the table before and after."""

import argparse

from orepa_mm.errors import run_tool
from orepa_mm.files import require_writable_file
from orepa_mm.workflow import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('train_dir', help='work folder of the training run')
    parser.add_argument('deployed_dir', help='output folder of tools/reparam.py')
    parser.add_argument('--out', default='report.html', help='HTML file to write')
    parser.add_argument('--num-images', type=int, default=4, help='validation images to show')
    args = parser.parse_args()
    if args.num_images < 1:
        parser.error('--num-images must be 1 at least')
    require_writable_file(args.out)
    print('wrote', write_report(args.train_dir, args.deployed_dir, args.out, args.num_images))


if __name__ == '__main__':
    run_tool(main)
