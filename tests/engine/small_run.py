"""A small classifier whose validation needs care, and its runs."""

import copy
import itertools
import weakref

import torch
from helpers import randomize
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset, default_collate

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d
from orepa_mm.reparam import is_training_form

OURS = dict(type='ReparamTestHook')
EMA = dict(type='EMAHook', momentum=0.3)
EPOCHS = dict(by_epoch=True, max_epochs=2)
ITERATIONS = dict(by_epoch=False, max_iters=4, val_interval=2)


class InPlacePreprocessor(BaseDataPreprocessor):
    """Works on the batch that it is given: doing it twice gives something else."""

    def forward(self, data, training=False):
        data['inputs'].sub_(0.5).mul_(2)
        if training:
            data['inputs'] = data['inputs'].flip(-1)
        return super().forward(data, training)


class Net(BaseModel):
    """A classifier with dropout, which draws random numbers in training and, to no use, in eval."""

    def __init__(self, conv=OREPAConv2d, pointwise=OREPAConv1x1, norm=nn.BatchNorm2d):
        super().__init__(InPlacePreprocessor())
        self.backbone = nn.Sequential(
            conv(3, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(), nn.Dropout(0.2),
            pointwise(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.backbone[1].eval()  # as a frozen norm layer
        self.backbone[5].bias.requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def extract_feat(self, inputs):
        return self.backbone(inputs)

    def train(self, mode=True):
        super().train(mode)
        self.backbone[1].eval()
        return self

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.head(self.extract_feat(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, data_samples))
        if mode == 'predict':
            return list(logits)
        torch.rand(1)
        return logits


class Images(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.rand(count, 3, 8, 8, generator=generator)
        self.labels = torch.arange(count) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return dict(inputs=self.inputs[index], data_samples=self.labels[index])


VAL = Images(6, seed=1)


class Recorder(BaseMetric):
    """What each validation computed."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        self.epochs.append(torch.stack(results))
        return dict(score=float(len(self.epochs)))


class Observer(Hook):
    """What the runner's model is, as the hooks before and after ours see it."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.before, self.during, self.after, self.copies = [], [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.last = described(runner.model)

    def before_val(self, runner):
        self.before.append(described(runner.model))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        assert not runner.model.training
        self.during.append(is_training_form(runner.model))
        self.copies.append(weakref.ref(runner.model))

    def after_val_epoch(self, runner, metrics=None):
        self.after.append(described(runner.model))


def described(model):
    """Identity of the model and of its parameters, and all flags."""
    return (id(model), [(name, id(m), m.training) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()])


class QuickRunner(Runner):
    def _log_env(self, env_cfg):
        pass


numbers = itertools.count()


def build(folder, *hooks, model=None, train_cfg=EPOCHS, checkpoint=None, **kwargs):
    torch.manual_seed(0)
    loader = dict(dataset=Images(8, seed=0), batch_size=4, num_workers=0,
                  collate_fn=default_collate)
    val_loader = {**loader, 'dataset': VAL, 'batch_size': 2,
                  'sampler': dict(type='DefaultSampler', shuffle=False)}
    return QuickRunner(
        model or randomize(Net()), str(folder), train_cfg=dict(train_cfg),
        train_dataloader={**loader, 'sampler': dict(
            type='DefaultSampler' if train_cfg['by_epoch'] else 'InfiniteSampler', shuffle=True)},
        val_dataloader=val_loader, val_cfg=dict(), val_evaluator=Evaluator(Recorder()),
        test_dataloader=val_loader, test_cfg=dict(), test_evaluator=Evaluator(Recorder()),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.2, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(
            type='CheckpointHook', interval=1, by_epoch=train_cfg['by_epoch'],
            **(checkpoint or {}))),
        custom_hooks=[dict(hook) if isinstance(hook, dict) else hook for hook in hooks],
        randomness=dict(seed=0), experiment_name=f'{folder.name}-{next(numbers)}', **kwargs)


def recorded(evaluator):
    return evaluator.metrics[0].epochs


def predictions(model):
    """From scratch: all images in one batch, preprocessed by hand."""
    model = copy.deepcopy(model)
    model.eval()
    with torch.no_grad():
        return model((VAL.inputs - 0.5) * 2)


def log_of(folder, level):
    lines = '\n'.join(path.read_text() for path in folder.rglob('*.log')).split('\n20')
    return [line for line in lines if f' - {level} - ' in line]


def assert_same_tree(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same_tree(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other
