"""The learning rate of the stem, and what is decayed."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from orepa_mm.backbones.det import OREPAResNet
from orepa_mm.engine import optimizer
from orepa_mm.layers import OREPAConv2d


def groups_by_name(model, **paramwise):
    wrapper = build_optim_wrapper(model, dict(
        type='OptimWrapper', constructor='OREPAOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=0.1, weight_decay=0.01), paramwise_cfg=paramwise))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: (round(group['lr'], 8), group['weight_decay'])
            for group in wrapper.param_groups for parameter in group['params']
            if id(parameter) in names}  # OptimWrapper adds a group of its own


@pytest.fixture
def model():
    return nn.Sequential(OREPAResNet(18, base_channels=8, zero_init_residual=False))


def test_only_the_stem_learns_slower(model):
    groups = groups_by_name(model, stem_lr_mult=0.1)
    assert len(groups) == len(list(model.parameters()))
    for name, (rate, decay) in groups.items():
        assert rate == (0.01 if name.startswith('0.conv1.weight') else 0.1), name
        assert decay == 0.01


def test_decay_as_the_authors(model):
    groups = groups_by_name(model, stem_lr_mult=0.1, norm_decay_mult=0., bias_decay_mult=0.)
    norms = [f'0.{name}.' for name, m in model[0].named_modules()
             if isinstance(m, nn.BatchNorm2d)]
    for name, (_, decay) in groups.items():
        assert decay == (0 if name.startswith(tuple(norms)) else 0.01), name
    assert groups['0.layer1.0.conv1.vector'] == (0.1, 0.01)


def test_beside_other_rules(model):
    groups = groups_by_name(model, stem_lr_mult=0.5, custom_keys={
        '0': dict(lr_mult=0.1), 'layer4': dict(lr_mult=1.0)})
    assert groups['0.conv1.weight1.vector'][0] == 0.005
    assert groups['0.layer1.0.conv1.vector'][0] == 0.01
    assert groups['0.layer4.0.conv1.vector'][0] == 0.1


def test_scheduled_rates_keep_the_factor(model):
    wrapper = build_optim_wrapper(model, dict(
        constructor='OREPAOptimWrapperConstructor', optimizer=dict(type='SGD', lr=0.1),
        paramwise_cfg=dict(stem_lr_mult=0.1)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapper.optimizer, lambda step: 0.5 ** step)
    wrapper.optimizer.step()
    scheduler.step()
    assert {round(group['lr'], 8) for group in wrapper.optimizer.param_groups} == {0.05, 0.005}


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(optimizer, 'print_log', lambda text, *args: lines.append(text))
    return lines


def test_nothing_to_slow_down_is_said(model, log):
    groups_by_name(nn.Sequential(OREPAConv2d(3, 3, 3)), stem_lr_mult=0.1)
    assert 'has no effect' in log.pop()
    frozen = OREPAResNet(18, base_channels=8, frozen_stages=1)
    assert not any(name.startswith('conv1') for name in groups_by_name(frozen, stem_lr_mult=0.1))
    assert 'has no effect' in log.pop()
    assert len(groups_by_name(model)) == len(list(model.parameters()))
    groups_by_name(model, stem_lr_mult=0.1)
    assert not any('has no effect' in line for line in log)


@pytest.mark.parametrize('value', ['fast', -1, None])
def test_a_factor_that_is_none_is_an_error(model, value):
    with pytest.raises(ValueError, match='stem_lr_mult must be a number'):
        groups_by_name(model, stem_lr_mult=value)
