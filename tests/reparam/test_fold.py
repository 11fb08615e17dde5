"""Folding BN: what is folded, what must not be, and what is kept."""

import copy

import pytest
import torch
from helpers import randomize, relative_error
from mmcv.cnn import ConvModule, ConvWS2d, fuse_conv_bn
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from orepa_mm.layers import OREPAConv2d
from orepa_mm.reparam import fold_batch_norm, reparameterize


def images():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))


def folded(model):
    model = copy.deepcopy(model)
    return model, fold_batch_norm(model)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_against_mmcv():
    """The stock ResNet, where mmcv's own walk is right."""
    register_all_modules(init_default_scope=True)
    model = randomize(MODELS.build(dict(type='ResNet', depth=18, base_channels=8)))
    model.eval()
    mine, count = folded(model.double())
    assert count == len(norms(model)) == 20
    assert not norms(mine)
    theirs = fuse_conv_bn(copy.deepcopy(model))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for one, other, before in zip(mine(x), theirs(x), model(x)):
            assert relative_error(one, other) < 1e-12
            assert relative_error(one, before) < 1e-12
    marks = {f'{name}.folded_norm' for name, m in model.named_modules() if m in norms(model)}
    assert mine.state_dict().keys() - marks == {*theirs.state_dict()}


class BatchNormAct(nn.BatchNorm2d):
    """As timm has it: a BN with an activation of its own."""

    def forward(self, x):
        return super().forward(x).relu()


def with_hook():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def activation_twice():
    act = nn.ReLU()
    return nn.Sequential(act, nn.Conv2d(3, 4, 3), act, nn.BatchNorm2d(4))


NOT_FOLDED = {
    'weight standardisation': lambda: nn.Sequential(ConvWS2d(3, 4, 3), nn.BatchNorm2d(4)),
    'activation in the BN': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4)),
    'a hook': with_hook,
    'weight norm': lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    'spectral norm of old': lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    'the same activation twice': activation_twice,
    'a layer between': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    'BN first': lambda: ConvModule(3, 3, 3, norm_cfg=dict(type='BN'),
                                   order=('norm', 'conv', 'act')),
    'activation first': lambda: ConvModule(3, 4, 3, norm_cfg=dict(type='BN'),
                                           order=('conv', 'act', 'norm')),
    'no running statistics': lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    'other channels': lambda: nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3)]),
    'another norm': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
}


@pytest.mark.parametrize('name', NOT_FOLDED)
def test_what_does_not_follow_a_convolution_stays(name):
    model = NOT_FOLDED[name]().eval()
    if name != 'no running statistics':
        randomize(model)  # a fresh BN would commute with much
    after, count = folded(model)
    assert count == 0
    assert [type(m) for m in after.modules()] == [type(m) for m in model.modules()]
    for key, value in after.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_convolutions_shared_by_levels_are_not_folded():
    """As in RetinaSepBN heads, where mmcv's walk would fold one convolution several times."""
    conv = nn.Conv2d(3, 4, 3)
    model = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(4)) for _ in range(2)])
    assert folded(randomize(model))[1] == 0
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 3), norm) for _ in range(2)])
    assert folded(randomize(model))[1] == 0
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model = nn.Sequential(block, nn.ReLU(), block)  # shared as a whole: that can be folded
    after, count = folded(randomize(model).eval().double())
    assert count == 1
    assert relative_error(after(images()), model(images())) < 1e-12


@pytest.mark.parametrize('training', [True, False])
def test_everything_else_is_kept(training):
    conv = nn.Conv2d(4, 6, 3, padding=1, dilation=2, groups=2, bias=False)
    model = randomize(nn.Sequential(conv, nn.BatchNorm2d(6, eps=0.01))).bfloat16()
    model = model.to(memory_format=torch.channels_last).train(training)
    model.requires_grad_(False)
    after, count = folded(model)
    assert count == 1
    assert isinstance(after[1], nn.Identity)
    assert after[0].weight.dtype == after[0].bias.dtype == torch.bfloat16
    assert after[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in after.parameters())
    assert all(m.training is training for m in after.modules())
    exact = folded(copy.deepcopy(model).double())[0]
    assert torch.equal(after[0].weight, exact[0].weight.bfloat16())  # rounded once
    assert torch.equal(after[0].bias, exact[0].bias.bfloat16())


@pytest.mark.parametrize('trainable', [0, 1])
def test_what_either_side_trains_is_trained(trainable):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1 - trainable].requires_grad_(False)
    assert all(p.requires_grad for p in folded(model)[0].parameters())


def test_together_with_re_parameterization():
    model = randomize(nn.Sequential(
        OREPAConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4))).eval().double()
    after = reparameterize(model, fold_bn=True)
    assert not norms(after)
    assert relative_error(after(images()), model(images())) < 1e-12
    plain = reparameterize(model)
    assert len(norms(plain)) == 2
    # folding later, and once more, comes to the same
    for again in (reparameterize(plain, fold_bn=True), reparameterize(after, fold_bn=True)):
        for key, value in again.state_dict().items():
            assert torch.equal(value, after.state_dict()[key])
