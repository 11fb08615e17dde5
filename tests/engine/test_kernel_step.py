"""The relative step of the kernels, against a step that is known."""

import itertools

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from orepa_mm.engine import KernelStepHook
from orepa_mm.layers import build_orepa_conv

_numbers = itertools.count()  # of hubs, which are kept by name


class Runner:
    def __init__(self, model):
        self.model, self.iter = model, 0
        self.message_hub = MessageHub.get_instance(f'kernel step {next(_numbers)}')

    def step(self, hook, change):
        hook.before_train_iter(self, self.iter)
        with torch.no_grad():
            change()
        hook.after_train_iter(self, self.iter)
        self.iter += 1

    @property
    def logged(self):
        scalars = self.message_hub.log_scalars
        return list(scalars['train/kernel_step'].data[0]) if scalars else []


def test_the_step_is_that_of_the_generated_kernel():
    model = nn.Sequential(build_orepa_conv(4, 6, 3), nn.Conv2d(6, 4, 1), nn.Linear(4, 4))
    runner, hook = Runner(model), KernelStepHook(interval=2)

    def change():
        model[0].vector.mul_(1.5)  # and so the kernel, which is linear in it
        model[1].weight.mul_(0.9)
        model[2].weight.mul_(7)

    for _ in range(4):
        runner.step(hook, change)
    assert runner.logged == pytest.approx([(0.5 + 0.1) / 2] * 2)


def test_frozen_layers_have_no_step():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), build_orepa_conv(4, 4, 1))
    model[0].requires_grad_(False)
    runner, hook = Runner(model), KernelStepHook(interval=1)
    runner.step(hook, lambda: model[1].vector.mul_(1.25))
    assert runner.logged == pytest.approx([0.25])


def test_a_kernel_of_zeros_has_no_step():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    nn.init.zeros_(model[1].weight)  # as of the offsets of a deformable convolution
    runner, hook = Runner(model), KernelStepHook(interval=1)
    runner.step(hook, lambda: model[0].weight.mul_(1.25))
    runner.step(hook, lambda: [layer.weight.add_(layer.weight + 0.5) for layer in model[1:]])
    assert runner.logged == pytest.approx([0.25, 0.0])


def test_nothing_to_measure():
    runner, hook = Runner(nn.Linear(4, 4)), KernelStepHook(interval=1)
    runner.step(hook, lambda: None)
    assert runner.logged == []


@pytest.mark.parametrize('interval', [0, -1, 1.5, True, '50'])
def test_intervals(interval):
    with pytest.raises(ValueError, match='interval must be a positive integer'):
        KernelStepHook(interval)
