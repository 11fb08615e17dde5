"""From arguments to a config and a runner."""

import argparse

import pytest
from helpers import ROOT
from mmengine.config import Config

from orepa_mm.datasets import make_shapes_coco
from orepa_mm.engine import add_config_arguments, check_pretrained, find_config, load_config

FOLDER = ROOT / 'configs' / 'faster_rcnn'
LIGHT = FOLDER / 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_overrides_in_order(tmp_path):
    make_shapes_coco(tmp_path, 1, 1, 64)
    cfg = load_config(parse(LIGHT, '--data-root', tmp_path, '--cfg-options',
                            'model.roi_head.bbox_head.num_classes=7', 'train_cfg.max_iters=5'))
    assert cfg.work_dir == f'work_dirs/{LIGHT.stem}'
    assert cfg.train_cfg.max_iters == 5
    assert cfg.train_dataloader.dataset.data_root == str(tmp_path)
    assert cfg.model.roi_head.bbox_head.num_classes == 7  # explicit options win
    assert load_config(parse(LIGHT, '--work-dir', 'here')).work_dir == 'here'


def test_data_root_with_other_file_names(tmp_path):
    make_shapes_coco(tmp_path, 1, 1, 64)
    (tmp_path / 'annotations' / 'instances_train2017.json').rename(tmp_path / 'mine.json')
    cfg = load_config(parse(LIGHT, '--data-root', tmp_path, '--cfg-options',
                            'train_dataloader.dataset.ann_file=mine.json'))
    assert cfg.train_dataloader.dataset.ann_file == 'mine.json'
    assert cfg.model.roi_head.bbox_head.num_classes == 3


@pytest.mark.parametrize('name', ['--local_rank', '--local-rank'])
def test_both_spellings_of_the_rank(name):
    assert parse(LIGHT, f'{name}=1').local_rank == 1


def test_own_configs_are_found_by_name():
    assert find_config(LIGHT.name) == LIGHT
    assert find_config(str(LIGHT)) == LIGHT


def test_missing_config():
    with pytest.raises(FileNotFoundError, match=r'no config file nothing\.py'):
        load_config(parse('nothing.py'))


def test_missing_pretrained_weights_say_what_to_do():
    cfg = Config.fromfile(FOLDER / 'faster-rcnn_orepa-r50_fpn_1x_coco.py')
    with pytest.raises(FileNotFoundError) as error:
        check_pretrained(cfg)
    message = str(error.value)
    assert 'mim run orepa_mm convert_checkpoint' in message
    options = message.partition('--cfg-options ')[2].split()
    cfg.merge_from_dict({key: {'None': None, '-1': -1, 'False': False}[value]
                         for key, value in (option.split('=') for option in options)})
    check_pretrained(cfg)
    cfg.model.neck.init_cfg = dict(type='Pretrained', checkpoint=None)
    check_pretrained(cfg)
    assert cfg.model.backbone.frozen_stages == -1
