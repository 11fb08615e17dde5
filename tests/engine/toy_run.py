"""The smallest run that writes checkpoints, also for processes that are killed."""

import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from orepa_mm.engine import build_runner


@RUNNERS.register_module(force=True)
class ToyRunner(Runner):
    def _log_env(self, env_cfg):
        pass  # takes longer than the training


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, inputs, mode='tensor'):
        output = self.layer(inputs)
        return dict(loss=output.square().mean()) if mode == 'loss' else output


@DATASETS.register_module(force=True)
class ToyData(Dataset):
    def __init__(self, width=4):
        self.width = width

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.full((self.width,), float(index)))


@METRICS.register_module(force=True)
class ToyMetric(BaseMetric):
    """Gives the next of its scores at each validation."""

    def __init__(self, scores):
        super().__init__()
        self.scores = iter(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        score = next(self.scores)
        return dict(acc=score, loss=score)


@HOOKS.register_module(force=True)
class ToyProgress(Hook):
    """Notes in a file how far the run is, before each iteration."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        with Path(runner.work_dir, 'progress').open('a') as file:
            file.write(f'{os.getpid()} {runner.iter}\n')


def toy_config(work_dir, hook='WholeCheckpointHook', *, width=4, max_iters=6, by_epoch=False,
               scores=None, resume=False, checkpoint=None, **kwargs):
    """A config of a run of iterations, or of epochs of one iteration."""
    loader = dict(dataset=dict(type='ToyData', width=width), batch_size=2, num_workers=0,
                  collate_fn=dict(type='default_collate'))
    train_cfg = dict(by_epoch=True, max_epochs=max_iters) if by_epoch else dict(
        by_epoch=False, max_iters=max_iters, val_interval=1)
    if scores:
        kwargs.update(
            val_cfg=dict(), val_evaluator=dict(type='ToyMetric', scores=list(scores)),
            val_dataloader={**loader, 'sampler': dict(type='DefaultSampler', shuffle=False)})
    return Config(dict(
        runner_type='ToyRunner', work_dir=str(work_dir), launcher='none', resume=resume,
        model=dict(type='ToyModel', width=width), train_cfg=train_cfg,
        train_dataloader={**loader, 'sampler': dict(
            type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=False)},
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type=hook, by_epoch=by_epoch, interval=2,
                                           **(checkpoint or {}))),
        custom_hooks=[dict(type='ToyProgress')], randomness=dict(seed=0), **kwargs))


def train(*args, **kwargs):
    """Train in this process."""
    torch.set_num_threads(1)
    runner = build_runner(toy_config(*args, **kwargs))
    runner.train()
    return runner
