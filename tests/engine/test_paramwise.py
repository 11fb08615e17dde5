"""A rule for a convolution's weight is for the layer as a whole; a stock model is the oracle."""

import pytest
from helpers import LAYERS
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from torch import nn

from orepa_mm.layers import DBBConv2d, OREPAConv2d, reparam_layers
from orepa_mm.openmmlab.patches import patch

KINDS = {**LAYERS, 'DBB': lambda **kw: DBBConv2d(4, 6, 3, padding=1, **kw)}
CONSTRUCTORS = ('DefaultOptimWrapperConstructor', 'OREPAOptimWrapperConstructor',
                'mmpretrain.LearningRateDecayOptimWrapperConstructor',
                'mmseg.ForceDefaultOptimWrapperConstructor')


class Net(BaseModule):
    """Two convolutions and a BN, in one module; mmpretrain's rules ask for depths."""

    def __init__(self, conv, **kwargs):
        super().__init__()
        self.a = nn.Sequential(conv(bias=True), nn.BatchNorm2d(6))
        self.b = conv(bias=True)

    def get_layer_depth(self, name, prefix=''):
        return 1, 2


def settings(model, constructor, **paramwise):
    """{parameter: (learning rate, weight decay, factor that some note beside)}."""
    wrapper = build_optim_wrapper(model, dict(
        constructor=constructor, optimizer=dict(type='SGD', lr=0.1, weight_decay=0.01),
        paramwise_cfg=paramwise))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: (round(group['lr'], 8), round(group['weight_decay'], 8),
                                   group.get('lr_mult'))
            for group in wrapper.optimizer.param_groups for parameter in group['params']
            if id(parameter) in names}


def weight_of(model, name):
    """The parameter of the stock model that a parameter is for."""
    for prefix, layer in model.named_modules():
        if layer in set(reparam_layers(model)) and name.startswith(f'{prefix}.'):
            return name if name == f'{prefix}.bias' else f'{prefix}.weight'
    return name


RULES = {
    'the weight': {'a.0.weight': dict(lr_mult=0.5, decay_mult=0.)},
    'the layer': {'a.0': dict(lr_mult=0.5), 'b.bias': dict(lr_mult=0.2)},
    'every weight': {'weight': dict(decay_mult=0.5)},
    'a weight and more': {'b': dict(lr_mult=0.1), 'b.weight': dict(lr_mult=0.5)},
    'names of branches hold it': {key: dict(lr_mult=0.1) for key in (
        'conv', 'conv1', 'conv2', 'avg', 'r', '1x1', 'pw', 'bn', 'origin')},
    'a bias': {'b.bias': dict(lr_mult=0.1)},
    'none': {'c.weight': dict(lr_mult=0.1)},
}


@pytest.mark.parametrize('constructor', CONSTRUCTORS)
@pytest.mark.parametrize('rules', RULES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_rule_for_a_weight_is_for_all_that_generates_it(kind, rules, constructor):
    if '.' in constructor:
        pytest.importorskip(f'{constructor.partition(".")[0]}.engine')
    model = Net(KINDS[kind])
    stock = settings(Net(lambda **kw: nn.Conv2d(4, 6, 3, **kw)), constructor,
                     custom_keys=RULES[rules])
    found = settings(model, constructor, custom_keys=RULES[rules])
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, given in found.items():
        assert given == stock[weight_of(model, name)], name


def test_a_rule_for_a_branch_is_for_that_branch():
    rules = {'a.0.weight': dict(lr_mult=0.5), 'b.weight_orepa_origin': dict(lr_mult=0.),
             'vector': dict(lr_mult=0.2)}
    found = settings(Net(KINDS['kxk']), CONSTRUCTORS[0], custom_keys=rules)
    assert {name: found[name][:2] for name in (
        'a.0.vector', 'a.0.weight_orepa_origin', 'b.weight_orepa_origin', 'b.weight_orepa_1x1',
        'b.vector')} == {
            'a.0.vector': (0.05, 0.01), 'a.0.weight_orepa_origin': (0.05, 0.01),
            'b.weight_orepa_origin': (0., 0.01), 'b.weight_orepa_1x1': (0.1, 0.01),
            'b.vector': (0.02, 0.01)}


@pytest.mark.parametrize('constructor', [*CONSTRUCTORS[:2], CONSTRUCTORS[3]])
@pytest.mark.parametrize('kind', ['depthwise kxk of RepVGG', 'depthwise', 'depthwise DBB', 'kxk'])
@pytest.mark.parametrize('options', [
    dict(dwconv_decay_mult=0.), dict(dwconv_decay_mult=0.5, bias_decay_mult=0.),
    dict(dwconv_decay_mult=0., custom_keys={'a.0.weight': dict(decay_mult=0.3)}),
    dict(dwconv_decay_mult=0., norm_decay_mult=0.2, custom_keys={'avg': dict(lr_mult=0.3)})])
def test_depthwise_layers_are_depthwise_convolutions(kind, options, constructor):
    if '.' in constructor:
        pytest.importorskip(f'{constructor.partition(".")[0]}.engine')
    kinds = {**KINDS, 'depthwise': lambda **kw: OREPAConv2d(4, 4, 3, groups=4, **kw),
             'depthwise DBB': lambda **kw: DBBConv2d(4, 4, 3, padding=1, groups=4, **kw)}
    model = Net(kinds[kind])
    stock = settings(Net(lambda **kw: nn.Conv2d(4, 4, 3, groups=4 if 'depth' in kind else 1, **kw)),
                     constructor, **options)
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, given in settings(model, constructor, **options).items():
        if name.rpartition('.')[0] in norms and 'dbb' in name:
            continue  # of DBB's branches, for which there are rules as for any BN
        assert given[:2] == stock[weight_of(model, name)][:2], name


def test_the_given_rules_stay_as_they_are():
    rules = {'a.0.weight': dict(lr_mult=0.5)}
    from mmengine.optim import DefaultOptimWrapperConstructor as Stock
    patch()
    assert not hasattr(Stock.__call__.__wrapped__, '_orepa_mm')  # once
    constructor = Stock(dict(optimizer=dict(type='SGD', lr=0.1)), dict(custom_keys=rules))
    constructor(Net(KINDS['kxk']))
    assert constructor.paramwise_cfg == dict(custom_keys={'a.0.weight': dict(lr_mult=0.5)})
    assert rules == {'a.0.weight': dict(lr_mult=0.5)}


@pytest.mark.parametrize('kind', LAYERS)
def test_no_branch_is_flat(kind):
    """Rules for what has one dimension leave weights alone (`flat_decay_mult`, layer decay)."""
    shapes = {name: parameter.dim() for name, parameter in LAYERS[kind]().named_parameters()}
    assert [name for name, dim in shapes.items() if dim < 2] == ['bias']


@pytest.mark.parametrize('constructor', CONSTRUCTORS[:2])
def test_the_layer_as_the_model_itself(constructor):
    found = settings(OREPAConv2d(4, 6, 3), constructor, custom_keys={'weight': dict(lr_mult=0.5)})
    assert {rate for name, (rate, *_) in found.items() if name != 'bias'} == {0.05}
    assert found['bias'][0] == 0.1
