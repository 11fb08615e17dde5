"""From arguments to a config and a runner."""

import argparse
import json
import os

import pytest
import torch
from helpers import ROOT, run_each
from mmengine.config import Config
from mmengine.model import PretrainedInit
from toy_run import toy_config

from orepa_mm.checkpoints import load_weights
from orepa_mm.datasets import make_shapes_coco
from orepa_mm.engine import (
    add_config_arguments,
    build_runner,
    check_pretrained,
    find_config,
    load_config,
)
from orepa_mm.errors import CheckpointError, DataRootError

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


def test_annotations_that_make_results_wrong_are_refused(tmp_path):
    """One NaN box among those to test on raises AP without a word."""
    make_shapes_coco(tmp_path, 1, 1, 64)
    arguments = parse(LIGHT, '--data-root', tmp_path)
    path = tmp_path / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2] = float('nan')
    path.write_text(json.dumps(content))
    for splits in (['test'], ['val'], ['train', 'val', 'test']):
        with pytest.raises(DataRootError, match='NaN or infinite'):
            load_config(arguments, splits)
    load_config(arguments, ['train'])
    load_config(arguments, check=False)


@pytest.mark.parametrize(('saved', 'built', 'hint'), [
    ((3, 2), (4, 2), True), ((3, 2), (3, 4), False), ((3, 2), (4, 4), False)])
def test_weights_for_other_classes_say_which_option_was_forgotten(tmp_path, saved, built, hint):
    torch.save(torch.nn.Conv2d(*saved[::-1], 1).state_dict(), tmp_path / 'model.pth')
    with pytest.raises(CheckpointError, match='size mismatch') as error:
        load_weights(torch.nn.Conv2d(*built[::-1], 1), tmp_path / 'model.pth')
    said, found, rest = str(error.value).partition('--data-root')
    assert bool(found) == hint
    assert not hint or ('other classes' in said and 'size mismatch' in rest)  # the reason first


@pytest.mark.parametrize('tool', ['test', 'reparam'])
def test_tools_that_read_no_training_data(tmp_path, tool):
    """They get as far as the checkpoint, which is not there; NaN boxes end them before."""
    make_shapes_coco(tmp_path, 1, 1, 64)
    (tmp_path / 'annotations' / 'instances_train2017.json').unlink()
    path = tmp_path / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2] = float('nan')
    (tmp_path / 'nan.json').write_text(json.dumps(content))
    command = [f'tools/{tool}.py', LIGHT, tmp_path / 'no.pth', '--data-root', tmp_path,
               '--work-dir', tmp_path / 'run']
    good, bad = run_each(command, [*command, '--cfg-options',
                                   f'test_evaluator.ann_file={tmp_path / "nan.json"}'])
    assert good[0] == bad[0] == 1
    assert 'no.pth' in good[1]
    assert 'nan.json: box is NaN or infinite' in bad[1]
    assert 'Traceback' not in good[1] + bad[1]


def test_tools_that_read_no_data_of_the_config(tmp_path):
    """They take the classes of what is there, and need no other files."""
    make_shapes_coco(tmp_path, 1, 1, 64)
    (tmp_path / 'annotations' / 'instances_train2017.json').unlink()
    args = parse(LIGHT, '--data-root', tmp_path)
    cfg = load_config(args, splits=())
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    with pytest.raises(DataRootError, match=r'instances_train2017\.json is missing'):
        load_config(args)
    data = ['--data-root', tmp_path]
    for code, output in run_each(
            ['tools/predict.py', LIGHT, tmp_path / 'no.pth', tmp_path, '--out', tmp_path / 'out',
             *data],
            ['tools/branch_similarity.py', LIGHT, tmp_path / 'no.pth', *data]):
        assert code == 1
        assert 'no.pth' in output
        assert 'is missing' not in output


@pytest.mark.parametrize('name', ['--local_rank', '--local-rank'])
def test_both_spellings_of_the_rank(name):
    assert parse(LIGHT, f'{name}=1').local_rank == 1


def test_own_configs_are_found_by_name():
    assert find_config(LIGHT.name) == LIGHT
    assert find_config(str(LIGHT)) == LIGHT


def test_missing_config():
    with pytest.raises(FileNotFoundError, match=r'no config file nothing\.py'):
        load_config(parse('nothing.py'))


def options_of(message):
    """What each `--cfg-options` of a message says, as the command line is read."""
    lines = [line.strip().rstrip(',') for line in message.splitlines()]
    return [parse(LIGHT, *line.split()).cfg_options for line in lines
            if line.startswith('--cfg-options')]


@pytest.mark.parametrize(('name', 'plain'), [
    ('faster-rcnn_orepa-r50-in1k_fpn_1x_coco.py', 'torchvision://resnet50'),
    ('faster-rcnn_orepa-x50-32x4d-in1k_fpn_1x_coco.py', 'torchvision://resnext50_32x4d'),
    ('faster-rcnn_orepa-repvgg-a1_fpn_1x_coco.py', None),
    ('faster-rcnn_dbb-r50_fpn_1x_coco.py', None),
])
def test_missing_pretrained_weights_say_what_to_do(name, plain):
    """Each way that the message names leads past the check."""
    cfg = Config.fromfile(FOLDER / name)
    with pytest.raises(FileNotFoundError) as error:
        check_pretrained(cfg)
    message = str(error.value)
    assert ('mim run orepa_mm convert_checkpoint AUTHORS_FILE checkpoints/orepa-' in message) == (
        'orepa' in name)
    ways = options_of(message)
    assert len(ways) == (2 if plain else 1)
    for options in ways:
        changed = Config.fromfile(FOLDER / name)
        changed.merge_from_dict(options)
        check_pretrained(changed)
    assert changed.model.backbone.init_cfg is None  # the last way: from scratch
    assert changed.model.backbone.frozen_stages == -1
    assert changed.model.backbone.norm_eval is False
    if plain:
        cfg.merge_from_dict(ways[0])
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=plain,
                                                   prefix=None)
    changed.model.neck.init_cfg = dict(type='Pretrained', checkpoint=None)
    check_pretrained(changed)


def test_a_missing_file_for_a_stock_part():
    """There is nothing to convert for it, and no option that it may not have."""
    cfg = Config(dict(model=dict(type='Expanded', model_type='RTMDet', backbone=dict(
        type='CSPNeXt', init_cfg=dict(type='Pretrained', checkpoint='no/such.pth')))))
    with pytest.raises(FileNotFoundError, match=r'no/such\.pth, which is no file') as error:
        check_pretrained(cfg)
    assert 'convert_checkpoint' not in str(error.value)
    assert options_of(str(error.value)) == [
        {'model.backbone.init_cfg.checkpoint': 'PLAIN_FILE_OR_ADDRESS',
         'model.backbone.init_cfg.prefix': None},
        {'model.backbone.init_cfg': None}]


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_a_missing_file_in_a_list(kind):
    cfg = Config(dict(model=dict(type='X', neck=dict(type='Y', init_cfg=[
        dict(type='Xavier', layer='Linear'), dict(type=kind, checkpoint='no/such.pth')]))))
    with pytest.raises(FileNotFoundError, match=r'neck\.init_cfg\.1 asks for') as error:
        check_pretrained(cfg)
    options = options_of(str(error.value))[0]
    cfg.merge_from_dict(options)
    assert cfg.model.neck.init_cfg[1].checkpoint == 'PLAIN_FILE_OR_ADDRESS'


@pytest.mark.parametrize('name', ['faster-rcnn_orepa-r50_fpn_1x_coco.py', LIGHT.name])
def test_addresses_and_scratch_pass_the_check(name):
    check_pretrained(Config.fromfile(FOLDER / name))


@pytest.mark.parametrize(('name', 'expected'), [
    ('faster-rcnn_orepa-r50_fpn_1x_coco.py', 'WholeCheckpointHook'),  # inherits the stock hook
    (LIGHT.name, 'WholeCheckpointHook'),
])
def test_checkpoints_are_written_whole(name, expected):
    cfg = load_config(parse(FOLDER / name))
    assert cfg.default_hooks.checkpoint.type == expected
    cfg = load_config(parse(FOLDER / name, '--cfg-options',
                            'default_hooks.checkpoint.type=CheckpointHook'))
    assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'  # explicit options win


def test_stock_configs_keep_the_stock_hook(tmp_path):
    """The runner writes its config down: that must not need a package it does not import."""
    (tmp_path / 'stock.py').write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
    assert load_config(parse(tmp_path / 'stock.py')).default_hooks.checkpoint.type == (
        'CheckpointHook')


@pytest.mark.parametrize(('before', 'deterministic', 'after'), [
    (None, True, ':4096:8'), (':16:8', True, ':16:8'), (None, False, None)])
def test_deterministic_runs_set_what_cublas_needs(tmp_path, monkeypatch, before, deterministic,
                                                  after):
    """`torch.use_deterministic_algorithms` refuses CUDA's matrix products without it."""
    name = 'CUBLAS_WORKSPACE_CONFIG'
    monkeypatch.setenv(name, before or '')  # so that it is restored
    if before is None:
        monkeypatch.delenv(name)
    cfg = toy_config(tmp_path, experiment_name=f'deterministic-{before}-{deterministic}')
    cfg.randomness = dict(seed=0, deterministic=deterministic)
    try:
        build_runner(cfg)
        assert os.environ.get(name) == after
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_the_log_says_what_was_built(tmp_path):
    build_runner(toy_config(tmp_path, experiment_name='built'))
    log = next(tmp_path.rglob('*.log')).read_text()
    assert 'INFO - 0 of 0 convolutions are re-parameterizable' in log


def test_an_address_that_cannot_be_reached_is_one_line(tmp_path):
    """Of `tools/train.py`: no traceback, and the address, and where the file could be put."""
    make_shapes_coco(tmp_path, 2, 1, 64)
    (code, output), = run_each([
        'tools/train.py', FOLDER / 'faster-rcnn_orepa-r18-light-pretrained_fpn_400i_coco.py',
        '--data-root', tmp_path, '--work-dir', tmp_path / 'run', '--cfg-options',
        'model.backbone.init_cfg.checkpoint=http://127.0.0.1:9/resnet18.pth'])
    assert code == 1
    assert 'Traceback' not in output
    error = output[output.index('\nerror: '):]
    assert 'http://127.0.0.1:9/resnet18.pth cannot be downloaded' in error
    assert 'checkpoints/resnet18.pth' in error
