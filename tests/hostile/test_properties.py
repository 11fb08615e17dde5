"""What holds for any options, any kernel, any model, any config: few examples, always the same."""

import copy

import pytest
import torch
from helpers import ROOT, randomize, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

import orepa_mm
from orepa_mm.checkpoints import convert_official_state_dict, read_classifier
from orepa_mm.checkpoints.architectures import Architecture, build_backbone, key_in
from orepa_mm.export import deploy_config
from orepa_mm.layers import OREPAStemConv2d, reparam_layers
from orepa_mm.layers.builder import build_dbb_conv, build_orepa_conv

few = settings(derandomize=True, database=None, deadline=None, max_examples=15)
fewer = settings(few, max_examples=3)


@st.composite
def options(draw, kernels=(1, 3, 5, 7)):
    """Any valid convolution with a block."""
    kernel, groups = draw(st.sampled_from(kernels)), draw(st.sampled_from([1, 1, 2, 3]))
    return dict(
        in_channels=groups * draw(st.integers(1, 3)), out_channels=groups * draw(st.integers(1, 4)),
        kernel_size=kernel, groups=groups, bias=draw(st.booleans()),
        stride=draw(st.sampled_from([1, 2, (1, 2), 3])),
        padding=draw(st.sampled_from([0, 1, kernel // 2, (1, 0)])),
        dilation=draw(st.sampled_from([1, 1, 2])),
        padding_mode=draw(st.sampled_from(['zeros', 'zeros', 'reflect', 'circular'])))


def images(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, layer.in_channels, 17, 15, generator=generator).double()


def require_same(first, second, x):
    assert relative_error(first(x), second(x)) < 1e-10


@few
@given(options(), st.integers(0, 9))
def test_a_layer_is_the_convolution_that_it_says(kwargs, seed):
    layer = randomize(build_orepa_conv(**kwargs).double(), seed)
    x = images(layer, seed)
    stock = layer.to_conv2d()
    assert type(stock) is nn.Conv2d
    reference = nn.Conv2d(**kwargs).double()  # who says what the options mean
    with torch.no_grad():
        reference.weight.copy_(layer.squeeze(torch.float64))
        if layer.bias is not None:
            reference.bias.copy_(layer.bias)
    require_same(layer.train(), reference, x)
    require_same(stock, reference, x)
    require_same(layer.eval(), reference, x)
    require_same(orepa_mm.reparameterize(layer), reference, x)


@few
@given(options(kernels=(3, 5)), st.integers(0, 9))
def test_a_diverse_branch_block_is_the_convolution_that_it_becomes(kwargs, seed):
    """Of zeros alone around the image, as its BNs see the border."""
    kwargs.update(padding_mode='zeros', dilation=1, padding=kwargs['kernel_size'] // 2)
    layer = randomize(build_dbb_conv(**kwargs).double(), seed).eval()
    require_same(layer, orepa_mm.reparameterize(layer), images(layer, seed))


@few
@given(options(), st.integers(0, 9), st.floats(1e-3, 1e3))
def test_any_kernel_can_be_put_into_a_layer(kwargs, seed, size):
    layer = randomize(build_orepa_conv(**kwargs).double(), seed)
    kernel = torch.randn(layer.weight.shape).double() * size
    if isinstance(layer, OREPAStemConv2d) and layer.out_channels < 17:
        before = copy.deepcopy(layer.state_dict())
        try:  # a narrow one cannot take every kernel, and says so
            layer.set_kernel(kernel)
        except ValueError as error:
            assert 'too narrow' in str(error)  # noqa: PT017
            assert all(torch.equal(value, before[key])
                       for key, value in layer.state_dict().items())
            return
    else:
        layer.set_kernel(kernel)
    assert relative_error(layer.squeeze(torch.float64), kernel) < 1e-9
    again = copy.deepcopy(layer)
    again.set_kernel(kernel)
    assert relative_error(again.squeeze(torch.float64), kernel) < 1e-9


@st.composite
def networks(draw):
    """Convolutions of any kind with BN between some of them, and one used twice."""
    channels, parts = draw(st.integers(1, 4)), []
    first = channels
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([1, channels]))
        out = groups * draw(st.integers(1, 3))
        kernel = draw(st.sampled_from([1, 2, 3, (3, 1), 5]))
        parts.append(nn.Conv2d(channels, out, kernel, draw(st.sampled_from([1, 2])), padding=2,
                               groups=groups, bias=draw(st.booleans())))
        parts += [nn.BatchNorm2d(out)] * draw(st.booleans()) + [nn.ReLU()] * draw(st.booleans())
        channels = out
    last = nn.Conv2d(channels, channels, 3, padding=1)
    return first, nn.Sequential(*parts, last, last)


@few
@given(networks(), st.integers(0, 9))
def test_expanding_changes_no_output_and_can_be_undone(network, seed):
    channels, model = network
    randomize(model.double(), seed).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, channels, 19, 21).double()
    expanded = orepa_mm.expand(model)
    odd = {module for module in model.modules() if isinstance(module, nn.Conv2d)
           and module.kernel_size[0] == module.kernel_size[1] and module.kernel_size[0] % 2}
    assert len(list(reparam_layers(expanded))) == len(odd)
    require_same(expanded, model, x)
    back = orepa_mm.reparameterize(expanded)
    assert {key: value.shape for key, value in back.state_dict().items()} == {
        key: value.shape for key, value in before.items()}
    for key, value in back.state_dict().items():
        assert torch.allclose(value, before[key], rtol=1e-9, atol=1e-10), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@fewer
@given(st.sampled_from([18, 34, 50]), st.sampled_from([8, 24, 64]), st.integers(1, 12),
       st.sampled_from(['', 'module.']), st.booleans())
def test_the_converter_undoes_the_authors_names(depth, channels, classes, prefix, wrapped):
    """Names and shapes; the numbers are in tests/golden."""
    backbone = build_backbone(Architecture('', dict(
        type='OREPAResNet', depth=depth, base_channels=channels, stem_channels=channels), classes))
    state = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    features = state['backbone.layer4.1.bn2.weight' if depth < 50 else
                     'backbone.layer4.1.bn3.weight'].numel()
    with torch.device('meta'):
        state |= {'head.fc.weight': torch.empty(classes, features),
                  'head.fc.bias': torch.empty(classes)}
    theirs = {prefix + key_in('authors', key): value for key, value in state.items()}
    assert len(theirs) == len(state)
    converted = convert_official_state_dict({'state_dict': theirs} if wrapped else theirs)
    assert converted == state
    architecture, same = read_classifier(converted)
    assert same == state
    assert architecture.num_classes == classes
    assert architecture.backbone['depth'] == depth
    assert architecture.backbone.get('base_channels', 64) == channels


CONFIGS = sorted(path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts)


@fewer
@given(st.sampled_from(CONFIGS), st.sampled_from(['plain', 'folded']))
def test_deploying_a_config_twice_is_deploying_it_once(path, form):
    cfg = Config.fromfile(path)
    before = copy.deepcopy(cfg.to_dict())
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        deployed = deploy_config(cfg, form)
        assert cfg.to_dict() == before
        text = deployed.dump()
        if form == 'plain':
            assert 'OREPA' not in text
            assert 'orepa_mm' not in text
            assert deploy_config(deployed, form).to_dict() == deployed.to_dict()
    again = Config.fromstring(text, '.py')
    assert again.model.to_dict() == deployed.model.to_dict()


def test_the_examples_are_always_the_same():
    assert few.derandomize
    assert fewer.derandomize
    with pytest.raises(AttributeError):
        few.database.save(b'', b'')  # nothing is left in the project's folder
