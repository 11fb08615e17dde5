"""An interrupted run ends as one that was not, whatever draws random numbers in it."""

import random

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, MODELS
from toy_run import ToyData, ToyModel, toy_config

from orepa_mm.engine import ExactResumeHook, build_runner
from orepa_mm.errors import ConfigError


@DATASETS.register_module(force=True)
class NoisyData(ToyData):
    """Augments with every generator that augmentation uses."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(self.width)
        return dict(inputs=torch.full((self.width,), float(index)) + noise)


@MODELS.register_module(force=True)
class NoisyModel(ToyModel):
    """Draws in training and in evaluation."""

    def forward(self, inputs, mode='tensor'):
        return super().forward(inputs + random.random() + torch.randn_like(inputs), mode)


def config(folder, hook, workers, **kwargs):
    cfg = toy_config(folder, max_iters=6, scores=range(20), **kwargs)
    cfg.model.type = 'NoisyModel'
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.type = 'NoisyData'
        loader.num_workers = workers
    cfg.train_dataloader.sampler.shuffle = True
    if hook:
        cfg.custom_hooks = [dict(type='ExactResumeHook')]
    return cfg


def weights_after(folder, hook, workers, interrupted, **kwargs):
    """Trained at once, or to iteration (epoch) 4 and then on; drawing in between."""
    torch.set_num_threads(1)
    name = f'{folder.parent.name}-{hook}-{interrupted}'
    if interrupted:
        first = config(folder, hook, workers, experiment_name=f'{name}-1', **kwargs)
        limit = 'max_epochs' if kwargs.get('by_epoch') else 'max_iters'
        first.train_cfg[limit] = 4
        build_runner(first).train()
        torch.rand(3), random.random(), np.random.rand()
    cfg = config(folder, hook, workers, experiment_name=f'{name}-2', resume=interrupted, **kwargs)
    runner = build_runner(cfg)
    runner.train()
    assert runner.iter == (12 if kwargs.get('by_epoch') else 6)
    return runner.model.layer.weight.detach()


@pytest.mark.parametrize(('workers', 'by_epoch'), [
    (2, False), (2, True), *(pytest.param(0, by_epoch, marks=pytest.mark.long)
                             for by_epoch in (False, True))])
def test_interrupted_or_not_the_weights_are_the_same(tmp_path, by_epoch, workers):
    straight, resumed = (weights_after(tmp_path / str(interrupted), True, workers, interrupted,
                                       by_epoch=by_epoch) for interrupted in (False, True))
    assert torch.equal(straight, resumed)


def test_without_the_hook_they_are_not(tmp_path):
    straight, resumed = (weights_after(tmp_path / str(interrupted), False, 0, interrupted)
                         for interrupted in (False, True))
    assert not torch.equal(straight, resumed)


def test_random_numbers_differ_between_iterations_and_epochs(tmp_path):
    """Also of workers that start anew at each epoch."""
    seen = []

    @DATASETS.register_module(force=True)
    class Constant(NoisyData):
        def __getitem__(self, index):
            return dict(inputs=torch.rand(self.width))

    class Model(ToyModel):
        def forward(self, inputs, mode='tensor'):
            seen.extend([inputs.flatten(), torch.rand(8)])
            return super().forward(inputs, mode)

    MODELS.register_module(module=Model, name='SeenModel', force=True)
    cfg = toy_config(tmp_path, max_iters=3, by_epoch=True, experiment_name='differ')
    cfg.model.type = 'SeenModel'
    cfg.train_dataloader.dataset.type = 'Constant'
    cfg.train_dataloader.num_workers = 1
    cfg.custom_hooks = [dict(type='ExactResumeHook')]
    build_runner(cfg).train()
    numbers = torch.cat(seen)
    assert len(seen) == 12
    assert len(numbers.unique()) == len(numbers)


def test_what_could_not_be_exact_is_an_error(tmp_path):
    cfg = config(tmp_path, True, 0, experiment_name='no-seed')
    cfg.randomness = dict(seed=None)
    with pytest.raises(ConfigError, match=r'randomness\.seed'):
        build_runner(cfg).train()
    cfg = config(tmp_path, True, 1, by_epoch=True, experiment_name='persistent')
    cfg.train_dataloader.persistent_workers = True
    with pytest.raises(ConfigError, match='persistent_workers=False'):
        build_runner(cfg).train()


def test_it_is_registered():
    from mmengine.registry import HOOKS
    assert HOOKS.get('ExactResumeHook') is ExactResumeHook
