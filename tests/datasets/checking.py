"""What the tests of the check share: configs, what is found, and faults made by hand."""

import json

from helpers import ROOT
from mmengine.hub import get_config

from orepa_mm.datasets import SPLITS, apply_data_root
from orepa_mm.datasets.check import check_data

MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
UPERNET = 'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py'
RESNET = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
LIGHT = ROOT / 'configs' / 'faster_rcnn' / 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


def checked(name, root, splits=SPLITS, **options):
    cfg = apply_data_root(get_config(name), root, splits, check=False)
    return check_data(cfg, splits, **options)


def found_in(check):
    """{(first word of the data's name, problem): effect}"""
    return {(finding.data.split()[0].strip(','), finding.problem): finding.effect
            for finding in check.findings}


def names_of(check, problem):
    return [name for finding in check.findings if finding.problem == problem
            for name in finding.names]


def edit(root, split, change):
    path = root / 'annotations' / f'instances_{split}2017.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(key, value):
    """Sets a value of the first annotation."""
    return lambda content: content['annotations'][0].update({key: value})


def cut(path, part=0.5):
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * part)])
