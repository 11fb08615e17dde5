"""From a plain model to the training form: the same function, and branches that learn."""

import copy
import sys

import pytest
import timm
import torch
import torchvision
from helpers import randomize, relative_error
from mmengine.registry import MODELS
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from orepa_mm import expand, reparameterize
from orepa_mm.errors import NothingToConvertError
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d, reparam_layers

CONVS = {
    '1x1': lambda **kw: nn.Conv2d(8, 12, 1, 2, **kw),
    '1x1 grouped': lambda **kw: nn.Conv2d(8, 4, 1, groups=2, **kw),
    '3x3': lambda **kw: nn.Conv2d(8, 12, 3, 2, 2, 2, **kw),
    '3x3 grouped': lambda **kw: nn.Conv2d(8, 16, 3, padding=1, groups=8, **kw),
    'depthwise 7x7': lambda **kw: nn.Conv2d(8, 8, 7, padding=3, groups=8, **kw),
    '5x5 reflect': lambda **kw: nn.Conv2d(8, 6, 5, padding=2, padding_mode='reflect', **kw),
    'stem': lambda **kw: nn.Conv2d(8, 64, 7, 2, 3, **kw),
}


@pytest.mark.parametrize('options', [{}, dict(single_init=True), dict(init_hyper_para=0.3)])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('case', CONVS)
def test_every_convolution_is_generated_exactly(case, bias, options):
    conv = CONVS[case](bias=bias).double()
    block = expand(conv, dict(type='OREPA', **options))
    x = torch.randn(2, 8, 15, 13, dtype=torch.float64)
    assert next(reparam_layers(block)) is block
    assert relative_error(block(x), conv(x)) < 1e-10
    back = reparameterize(block)
    assert type(back) is nn.Conv2d
    assert back.extra_repr() == conv.extra_repr()
    assert relative_error(back.weight, conv.weight) < 1e-10


def test_what_is_kept():
    """Dtype, layout, training flag, `requires_grad` of each tensor, and who shares what."""
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared).to(
        memory_format=torch.channels_last)
    model[0].requires_grad_(False).eval()
    model[1].bias.requires_grad_(False)
    expanded = expand(model)
    assert type(model[0]) is nn.Conv2d  # a copy was changed
    assert expanded[1] is expanded[3]
    assert not any(p.requires_grad for p in expanded[0].parameters())
    assert not expanded[0].training
    assert expanded[1].training
    assert [n for n, p in expanded[1].named_parameters() if not p.requires_grad] == ['bias']
    assert not expanded[1].weight_orepa_origin.is_contiguous()
    back = reparameterize(expanded)
    assert back[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 9, 9)
    assert relative_error(expanded(x), model(x)) < 1e-5
    half = expand(nn.Conv2d(3, 4, 3).bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert expand(model, inplace=True) is model
    assert isinstance(model[0], OREPAConv2d)


def test_names_decide():
    model = nn.ModuleDict({'backbone': nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)),
                           'head': nn.Sequential(nn.Conv2d(4, 4, 3))})
    found = expand(model, include=['backbone.*'], exclude=['*.1'])
    assert isinstance(found['backbone'][0], OREPAConv2d)
    assert type(found['backbone'][1]) is type(found['head'][0]) is nn.Conv2d
    found = expand(model, dict(type='OREPA', pointwise=False))
    assert type(found['backbone'][1]) is nn.Conv2d
    assert isinstance(found['head'][0], OREPAConv2d)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_what_has_no_block_is_left_and_named(monkeypatch):
    parametrized = nn.Conv2d(4, 4, 3)
    register_parametrization(parametrized, 'weight', nn.Tanh())
    model = nn.ModuleList([
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 4), nn.Conv2d(4, 4, (1, 3)), nn.Linear(2, 2),
        nn.ConvTranspose2d(4, 4, 2), Standardised(4, 4, 3), parametrized,
        nn.Conv2d(3, 8, 7), OREPAConv1x1(4, 4)])  # a 7 x 7 with too few channels for a stem
    kinds = [type(module) for module in model]
    logged = []
    monkeypatch.setattr(sys.modules[expand.__module__], 'log',
                        lambda text, *args: logged.append(text))
    expanded = expand(model)
    assert [type(module) for module in expanded][1:] == kinds[1:]
    assert isinstance(expanded[0], OREPAConv2d)
    text, = logged
    assert text.startswith('expanded 1 OREPAConv2d; left')
    for name, reason in ((1, 'odd square'), (4, 'transposed'), (5, 'more than a stock'),
                         (7, 'would miss it by')):
        assert any(f'({name}' in part and reason in part for part in text.split('; left')), name


@pytest.mark.parametrize(('model', 'message'), [
    (lambda: nn.Sequential(nn.Linear(2, 2)), 'no plain 2-D convolution at all'),
    (lambda: nn.Sequential(nn.Conv2d(2, 2, 2)), '0: .*odd square'),
    (lambda: nn.Sequential(OREPAConv2d(2, 2, 3)), 'no plain 2-D convolution'),
])
def test_nothing_to_expand_is_an_error(model, message):
    with pytest.raises(NothingToConvertError, match=message):
        expand(model())


def test_blocks_with_norms_inside_are_refused():
    with pytest.raises(TypeError, match='no linear function of its branches'):
        expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), dict(type='DBB'))


# --- whole models, of which none knows of blocks -----------------------------------------

NETWORKS = {
    'torchvision ResNet-18': lambda: torchvision.models.resnet18(width_per_group=64),
    'torchvision MobileNetV3': lambda: torchvision.models.mobilenet_v3_small(width_mult=0.5),
    'timm MobileNetV3': lambda: timm.create_model('mobilenetv3_small_050'),
    'timm ConvNeXt': lambda: timm.create_model('convnext_atto'),
    'ConvNeXt': lambda: MODELS.build(dict(type='mmpretrain.ConvNeXt', arch=dict(
        depths=[1, 1, 1, 1], channels=[8, 16, 24, 32]), out_indices=(0, 1, 2, 3))),
    'BiSeNetV2': lambda: MODELS.build(dict(
        type='mmseg.BiSeNetV2', detail_channels=(8, 8, 16), semantic_channels=(8, 8, 8, 16),
        semantic_expansion_ratio=2, bga_channels=16)),
    'STDC': lambda: MODELS.build(dict(
        type='mmseg.STDCNet', stdc_type='STDCNet1', in_channels=3, channels=(8, 8, 16, 32, 64),
        bottleneck_type='cat', num_convs=4, norm_cfg=dict(type='BN'),
        act_cfg=dict(type='ReLU'))),
    'CSPNeXt': lambda: MODELS.build(dict(type='mmdet.CSPNeXt', widen_factor=0.125,
                                         deepen_factor=0.167)),
}


def outputs(model, x):
    y = model(x)
    return y if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize('name', NETWORKS)
def test_a_whole_network_there_and_back(name):
    model = randomize(NETWORKS[name]())
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = outputs(model, x)
        expanded = expand(model)
        assert not [m for m in expanded.modules() if type(m) is nn.Conv2d and m.kernel_size
                    in ((1, 1), (3, 3), (5, 5)) and not _inside(m, expanded)]
        for one, other in zip(outputs(expanded, x), expected):
            assert relative_error(one, other) < 1e-4
        back = reparameterize(expanded)
        for one, other in zip(outputs(back, x), expected):
            assert relative_error(one, other) < 1e-4
    model.load_state_dict(back.state_dict(), strict=True)


def _inside(conv, model):
    return any(conv in set(layer.modules()) for layer in reparam_layers(model))


def test_a_training_step_reaches_every_branch_and_deploys():
    model = randomize(torchvision.models.resnet18()).double()
    expanded = expand(copy.deepcopy(model), inplace=True).train()
    layers = list(reparam_layers(expanded))
    assert len(layers) == 20
    assert isinstance(layers[0], OREPAStemConv2d)
    optimizer = torch.optim.SGD(expanded.parameters(), lr=1e-3)
    expanded(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().mean().backward()
    for layer in layers:
        assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    expanded.eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    deployed = reparameterize(expanded)
    assert relative_error(deployed(x), expanded(x)) < 1e-9
    model.load_state_dict(deployed.state_dict(), strict=True)
