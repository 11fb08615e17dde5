"""The README's lines of Python, on toy data, with a tiny model and two iterations."""

import json
import re

from helpers import ROOT, run
from pycocotools.coco import COCO

from orepa_mm import load
from orepa_mm.datasets import make_shapes_coco

CONFIG = f'''
_base_ = '{ROOT}/configs/faster_rcnn/NAME'
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
'''


def test_five_lines_of_python(tmp_path):
    block, = re.findall(r'^```py\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S)
    name, = re.findall(r"find_config\('(.*?)'\)", block)
    make_shapes_coco(tmp_path / 'my_data', 4, 3, 64)
    (tmp_path / name).write_text(CONFIG.replace('NAME', name))  # found before the package's own
    assert block.count('iter_400.pth') == 1
    script = block.replace('iter_400.pth', 'iter_2.pth')
    run('-c', f'import os; os.chdir({str(tmp_path)!r})\n{script}')
    report = json.loads((tmp_path / 'deployed' / 'report.json').read_text())
    assert report['verification']['passed']
    assert load(tmp_path / 'deployed').dataset_meta['classes'] == ('circle', 'square', 'triangle')
    predicted = COCO(tmp_path / 'predictions' / 'images.json')
    assert [image['file_name'] for image in predicted.dataset['images']] == [
        f'my_data/val2017/{i:06d}.png' for i in (1, 2, 3)]
    assert len(list((tmp_path / 'predictions' / 'vis').iterdir())) == 3
