"""A run in small: each step is tried, a failing one is named, and nothing is kept."""

import argparse
import sys
import tempfile

import pytest
import torch
from helpers import ROOT, run_each
from mmengine.registry import METRICS

from orepa_mm.datasets import make_shapes_imagenet
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import DryRunError
from orepa_mm.workflow.dry_run import dry_run

sys.path.insert(0, str(ROOT / 'tests' / 'engine'))
from toy_run import ToyModel, toy_config

STEPS = ['build', 'train 3 iterations', 'validate', 'save', 'load', 're-parameterize and verify']


@pytest.fixture(autouse=True)
def _all_files_are_here(tmp_path, monkeypatch):
    """Temporary folders too, so that what is left of them is seen."""
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))


def left(folder):
    return [path for path in folder.rglob('*')  # PyTorch keeps a cache of its own
            if path.name != 'tmp' and not path.name.startswith('torchinductor')]


def toy(folder, **kwargs):
    # 1 epoch of 2 images in batches of 2 has 1 iteration: of 1 image, 2
    cfg = toy_config(folder / 'run', experiment_name=f'dry-{folder.name}', **kwargs)
    cfg.train_dataloader.batch_size = 1
    return cfg


@pytest.mark.parametrize('by_epoch', [True, False])
def test_all_steps_and_nothing_left(tmp_path, by_epoch):
    cfg = toy(tmp_path, by_epoch=by_epoch, max_iters=99, scores=[1], checkpoint=dict(
        out_dir=str(tmp_path / 'elsewhere'), save_best='acc'))
    before, lines = cfg.pretty_text, []
    steps = dry_run(cfg, 3, lines.append)
    assert [step.name for step in steps] == STEPS
    assert len(lines) == len(STEPS) + 1
    assert steps[1].note.startswith(f'{2 if by_epoch else 3} done, loss ')
    assert steps[2].note == '1 batches, metrics acc, loss'
    assert steps[4].note == '2 tensors, strictly'
    assert 'nothing to re-parameterize' in steps[5].note
    assert cfg.pretty_text == before
    assert left(tmp_path) == []


def test_a_config_without_validation(tmp_path):
    assert 'no validation' in dry_run(toy(tmp_path), 1, lambda line: None)[2].note


@pytest.mark.parametrize(('step', 'words'), [
    ('build', 'choose another path'), ('train 3 iterations', 'has diverged: the loss is nan'),
    ('train 3 iterations', 'the loss is not finite'),  # only the loss
    ('validate', 'RuntimeError: no score .*test_dry_run.py, line'),
    ('load', 'it has no|has no layer')])
def test_a_step_that_fails_is_named(tmp_path, monkeypatch, step, words):
    cfg = toy(tmp_path, scores=[1])
    if step == 'build':
        (tmp_path / 'tmp' / 'file').touch()
        cfg.work_dir = str(tmp_path / 'tmp' / 'file')
    elif step.startswith('train'):
        monkeypatch.setattr(ToyModel, 'forward', lambda self, inputs, mode='tensor': dict(
            loss=self.layer(inputs).sum() * (torch.nan if 'diverged' in words else 0) + torch.nan))
    elif step == 'validate':
        def fail(self, results):
            raise RuntimeError('no score')
        monkeypatch.setattr(METRICS.get('ToyMetric'), 'compute_metrics', fail)
    else:
        monkeypatch.setattr(sys.modules[dry_run.__module__], 'built_model',
                            lambda cfg: torch.nn.Linear(2, 2))
    said = []
    with pytest.raises(DryRunError, match=f'failed at the step "{step}".*({words})'):
        dry_run(cfg, 3, said.append)
    assert len(said) == STEPS.index(step)
    assert [path for path in left(tmp_path) if path.name != 'file'] == []


@pytest.mark.long
def test_a_classifier_as_a_user_runs_it(tmp_path):
    """The whole way to the deployed form; the tool ends with 1 where data fail in the middle."""
    make_shapes_imagenet(tmp_path / 'data', 12, 12, 32)
    config = tmp_path / 'small.py'
    config.write_text(f'''
_base_ = '{ROOT}/configs/imagenet/orepa-resnet18-light_300i_in1k.py'
model = dict(backbone=dict(stem_channels=32, base_channels=8), head=dict(in_channels=64))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
''')
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    words = [str(config), '--data-root', str(tmp_path / 'data'), '--work-dir',
             str(tmp_path / 'run')]
    steps = dry_run(load_config(parser.parse_args(words)), 1, lambda line: None)
    assert steps[-1].note.startswith('both forms agree on 2 images')
    tool = ['tools/train.py', *words, '--dry-run']
    failed, none, resumed = run_each(
        [*tool, '1', '--cfg-options', 'model.head.num_classes=1', 'model.head.topk=(1,)'],
        [*tool, '0'], [*tool, '1', '--resume'])
    assert failed[0] == 1
    assert 'error: the dry run failed at the step "' in failed[1]
    assert 'Traceback' not in failed[1]
    assert none[0] == resumed[0] == 2
    assert not (tmp_path / 'run').exists()
    assert left(tmp_path / 'tmp') == []
