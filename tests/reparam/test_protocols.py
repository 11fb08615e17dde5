"""Blocks of others re-parameterize themselves: by seven names, and only if they are right."""

import copy
import logging
import sys

import pytest
import timm
import torch
from helpers import randomize, relative_error
from mmpretrain.models.backbones import RepMLPNet, RepVGG
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from orepa_mm import expand, reparameterize
from orepa_mm.layers import OREPAConv2d
from orepa_mm.reparam import is_training_form
from orepa_mm.reparam.foreign import PROTOCOLS


class ConvBN(nn.Module):
    """A part that converts itself as well, and would leave the block around it without its BN."""

    def __init__(self, channels, size):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv(x)) if hasattr(self, 'bn') else self.conv(x)

    def fused(self):
        bn = self.bn
        return fuse_conv_bn_weights(self.conv.weight, None, bn.running_mean, bn.running_var,
                                    bn.eps, bn.weight, bn.bias)

    def switch_to_deploy(self):
        kernel, bias = self.fused()
        channels, size = len(kernel), kernel.shape[-1]
        self.conv = nn.Conv2d(channels, channels, size, padding=size // 2)
        self.conv.weight.data, self.conv.bias.data = kernel, bias
        del self.bn


class Block(nn.Module):
    """Two branches and an activation; `convert` makes them one convolution, of a new dtype."""

    def __init__(self, channels=6):
        super().__init__()
        self.dense, self.point = ConvBN(channels, 3), ConvBN(channels, 1)
        self.act = nn.SiLU()

    def forward(self, x):
        if hasattr(self, 'deployed'):
            return self.act(self.deployed(x))
        return self.act(self.dense(x) + self.point(x))

    def convolution(self):
        (dense, bias), (point, more) = self.dense.fused(), self.point.fused()
        conv = nn.Conv2d(len(dense), len(dense), 3, padding=1)
        conv.weight.data.copy_(dense + nn.functional.pad(point, [1] * 4))
        conv.bias.data.copy_(bias + more)
        return conv

    def convert(self):
        self.deployed = self.convolution()
        for parameter in self.parameters():
            parameter.detach_()
        del self.dense, self.point


class WithItsOwnForward(Block):
    """As ultralytics: what was fused is called by another method."""

    def forward(self, x):
        return self.act(self.dense(x) + self.point(x))

    def forward_fuse(self, x):
        return self.act(self.deployed(x))


class ActivationInside(Block):
    """As copies of the authors' RepVGG block in forks: its convolution is another function."""

    def forward(self, x):
        if hasattr(self, 'deployed'):
            return super().forward(x)
        return self.act(self.dense(x).relu() + self.point(x))


class ForgetsItsStride(Block):
    """What is deployed gives other sizes."""

    def __init__(self):
        super().__init__()
        self.dense.conv.stride = self.point.conv.stride = (2, 2)


class ForgetsItsDilation(Block):
    """Right in the middle of the kernel only."""

    def __init__(self):
        super().__init__()
        self.dense.conv.dilation = self.dense.conv.padding = (2, 2)


class Excited(Block):
    """The scale that depends on the input is left out, as in MMPretrain's RepVGG."""

    def forward(self, x):
        if hasattr(self, 'deployed'):
            return super().forward(x)
        y = self.dense(x) + self.point(x)
        return self.act(y * y.mean((2, 3), keepdim=True).sigmoid())


class Fails(Block):
    def convolution(self):
        raise AssertionError('only for BN of another kind')


class BreaksOff(Block):
    """It has changed a part when it fails."""

    def convolution(self):
        del self.dense.bn
        return super().convolution()


def named(kind, protocol):
    """The block under the name that a package gives its method."""
    method = kind.convolution if protocol == 'fuse' else kind.convert
    if protocol == 'fuse':  # what comes in place of it
        def method(self):
            return nn.Sequential(self.convolution(), self.act)
    return type(kind.__name__, (kind,), {protocol: method})


def network(block):
    return randomize(nn.Sequential(OREPAConv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), block,
                                   OREPAConv2d(6, 4, 3, padding=1))).eval()


def images():
    return torch.randn(2, 3, 12, 12)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.fixture
def lines(monkeypatch):
    """What was logged, as (level, text)."""
    found = []
    monkeypatch.setattr(sys.modules['orepa_mm.reparam.reparameterize'], 'log',
                        lambda text, level=logging.INFO: found.append((level, text)))
    return found


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_every_name_is_known(protocol, inplace, lines):
    kind = WithItsOwnForward if protocol == 'fuse_convs' else Block
    model = network(named(kind, protocol)())
    model[2].act.train()
    model[2].requires_grad_(False)
    x, before = images(), copy.deepcopy(model)
    expected = before(x)
    deployed = reparameterize(model, inplace=inplace)
    assert (deployed is model) == inplace
    assert len(norms(deployed)) == 1
    assert relative_error(deployed(x), expected) < 1e-5
    assert [level for level, _ in lines] == [logging.INFO]
    assert f'1 {kind.__name__} by its own {protocol}()' in lines[0][1]
    block = deployed[2]
    assert not any(p.requires_grad for p in block.parameters())
    assert all(p.dtype == torch.float32 for p in block.parameters())
    assert not any(m.training for m in block.modules() if isinstance(m, nn.Conv2d))
    assert any(m.training for m in block.modules() if isinstance(m, nn.SiLU))
    if not inplace:
        assert model.state_dict().keys() == before.state_dict().keys()
        assert relative_error(model(x), expected) < 1e-6
    again = reparameterize(deployed)  # methods that have no guard of their own
    assert relative_error(again(x), expected) < 1e-5
    assert [type(m) for m in again.modules()] == [type(m) for m in deployed.modules()]
    assert all(level == logging.INFO for level, _ in lines)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('kind', [ActivationInside, ForgetsItsStride, ForgetsItsDilation, Excited,
                                  Fails, BreaksOff])
def test_a_block_that_would_be_another_function_stays_and_is_named(
        kind, inplace, lines, monkeypatch):
    model = network(named(kind, 'reparametrize')())
    x = images()
    expected, parameters = model(x), dict(model[2].named_parameters())
    monkeypatch.delattr(ConvBN, 'switch_to_deploy')  # else its parts convert themselves, rightly
    deployed = reparameterize(model, inplace=inplace)
    assert relative_error(deployed(x), expected) < 1e-5
    assert not is_training_form(deployed)
    warning = next(text for level, text in lines if level == logging.WARNING)
    assert warning.startswith(f'2 ({kind.__name__}) stays as it is: ')
    assert 'only for BN' in warning if kind is Fails else 'reparametrize()' in warning
    if inplace:  # an optimizer may hold them
        assert all(parameters[name] is p for name, p in deployed[2].named_parameters())


def test_the_outer_block_is_asked_before_its_parts():
    model = network(named(Block, 'switch_to_deploy')())
    deployed = reparameterize(model)
    assert [name for name, _ in deployed[2].named_children()] == ['act', 'deployed']
    alone = network(ConvBN(6, 3))
    x = images()
    assert len(norms(reparameterize(alone))) == 1
    assert relative_error(reparameterize(alone)(x), alone(x)) < 1e-5


class Walks(nn.Sequential):
    """A model whose method walks over its blocks, right and wrong ones alike."""

    def convert_to_deploy(self):
        for block in self.modules():
            if hasattr(block, 'reparametrize'):
                block.reparametrize()


def test_a_model_of_right_and_wrong_blocks(lines):
    """The right ones are converted, though the model's own method cannot be called."""
    right, wrong = named(Block, 'reparametrize'), named(ActivationInside, 'reparametrize')
    model = randomize(Walks(nn.Conv2d(3, 6, 3), right(), wrong(), right())).eval()
    nn.init.zeros_(model[3].dense.bn.weight)  # whatever reaches it, the last one hides it
    nn.init.zeros_(model[3].point.bn.weight)
    x = images()
    deployed = reparameterize(model)
    assert relative_error(deployed(x), model(x)) < 1e-5
    assert hasattr(deployed[1], 'deployed')
    assert hasattr(deployed[3], 'deployed')
    assert not hasattr(deployed[2], 'deployed')
    assert any(text.startswith('2 (ActivationInside) stays') for _, text in lines)
    right = randomize(Walks(nn.Conv2d(3, 6, 3), right())).eval()
    assert relative_error(reparameterize(right)(x), right(x)) < 1e-5


class Fuses(nn.Module):
    """A method of the same name that fuses what it is given, as in MMDetection's FPG."""

    def __init__(self):
        super().__init__()
        self.conv = OREPAConv2d(3, 4, 3)

    def forward(self, x):
        return self.fuse([self.conv(x), self.conv(x)])

    def fuse(self, maps):
        return sum(maps)


def test_a_method_that_needs_something_is_no_protocol(lines):
    model, x = randomize(Fuses()).eval(), images()
    assert relative_error(reparameterize(model)(x), model(x)) < 1e-5
    assert [level for level, _ in lines] == [logging.INFO]


class NeedsMore(Block):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = named(NeedsMore, 'switch_to_deploy')()

    def forward(self, x):
        return self.block(x, 2)


def test_what_runs_on_no_random_input_is_named(lines):
    """Its parts are converted, which do run."""
    model = network(Holder())
    x = images()
    deployed = reparameterize(model)
    assert relative_error(deployed(x), model(x)) < 1e-5
    assert len(norms(deployed)) == 1
    assert any('2.block (NeedsMore) stays' in text and 'no random input' in text
               for level, text in lines if level == logging.WARNING)


def test_repvgg_with_excitation_stays():
    arch = dict(num_blocks=[1] * 4, width_factor=[0.125] * 4, group_layer_map=None,
                se_cfg=dict(ratio=2, divisor=1), stem_channels=8)
    x = torch.randn(2, 3, 64, 64)
    for conv_cfg in (None, dict(type='OREPA')):
        model = randomize(RepVGG(arch, conv_cfg=conv_cfg))
        model.eval()
        for one in (model, expand(model) if conv_cfg is None else model):
            assert relative_error(reparameterize(one)(x)[0], model(x)[0]) < 1e-5


def test_what_cannot_be_computed_in_float64_is_converted_as_it_is():
    """RepMLP makes tensors of the default dtype."""
    model = RepMLPNet(dict(channels=[4, 8, 8, 8], depths=[1] * 4, sharesets_nums=[1] * 4),
                      img_size=64, patch_size=2, reparam_conv_kernels=(1, 3))
    model = randomize(model)
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    deployed = reparameterize(model)
    assert not [name for name, _ in deployed.named_modules() if 'repconv' in name]
    assert relative_error(deployed(x)[0], model(x)[0]) < 1e-5
    assert all(p.dtype == torch.float32 for p in deployed.parameters())


@pytest.mark.parametrize('name', [
    'repvgg_a0', 'ghostnetv3_050', *(pytest.param(name, marks=pytest.mark.long)
                                     for name in ('mobileone_s0', 'repvit_m0_9', 'fastvit_t8'))])
def test_networks_of_timm_as_timm_converts_them(name):
    """Beside a layer of ours, and expanded."""
    with torch.device('cpu'):
        model = timm.create_model(name, num_classes=5)
        for layer in norms(model):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
        model.eval()
        x = torch.randn(1, 3, 64, 64)
        expected = model(x)
        theirs = timm.utils.reparameterize_model(model)
        beside = nn.ModuleDict({'backbone': model, 'neck': OREPAConv2d(3, 4, 3)})
        for deployed in (reparameterize(beside)['backbone'], reparameterize(expand(model))):
            assert deployed.state_dict().keys() == theirs.state_dict().keys()
            assert relative_error(deployed(x), expected) < 1e-5
