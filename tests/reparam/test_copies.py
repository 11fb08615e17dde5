"""A copy calls nothing of the original; what replaces a layer stands wherever that is held."""

import copy
import functools

import pytest
import torch
import torch.nn.utils.prune
from helpers import randomize, relative_error
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.utils.checkpoint import checkpoint

from orepa_mm import expand, reparameterize
from orepa_mm.layers import (
    DBBConv2d,
    FoldedNorm,
    OREPAConv1x1,
    OREPAConv2d,
    OREPAStemConv2d,
    ReparamConv2d,
    reparam_layers,
)
from orepa_mm.reparam import fold_batch_norm, is_training_form


class Net(nn.Module):
    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.stem = conv(3, 4, 3, padding=1)
        self.stage = nn.Sequential(conv(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                   conv(4, 4, 3, padding=1))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.stage(self.stem(x)))


def images(channels=3):
    return torch.randn(2, channels, 8, 8)


def checkpointed(model):
    turn_on_activation_checkpointing(model, ['stage'])


def checkpointed_by_hand(model):
    forward = model.stage.forward
    model.stage.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


def efficient(model):
    turn_on_efficient_conv_bn_eval(model, 'stage')


def closed_over_a_layer(model):
    stage, stem, held = model.stage, model.stem, [model.head]
    model.forward = lambda x: held[0](stage(stem(x)))


def bound_elsewhere(model):
    model.run = model.stage.forward
    model.forward = functools.partial(lambda run, x: model.head(run(model.stem(x))), model.run)


def hooked(model):
    stage = model.stage
    model.stem.register_forward_hook(lambda module, args, output: output.clone())
    model.head.register_forward_hook(lambda module, args, output: output + stage[3].bias.sum())


HIDING = [checkpointed, checkpointed_by_hand, efficient, closed_over_a_layer, bound_elsewhere,
          hooked]


@pytest.mark.parametrize('hide', HIDING, ids=lambda hide: hide.__name__)
@pytest.mark.parametrize('convert', [expand, reparameterize, copy.copy])
def test_a_copy_is_its_own(convert, hide):
    """Whatever becomes of the original, the copy computes what it computed."""
    if convert is copy.copy:  # folding, of a copy of both
        def convert(model):
            return reparameterize(model, fold_bn=True)
    model = randomize(Net(nn.Conv2d if convert is expand else OREPAConv2d)).eval()
    hide(model)
    x = images()
    expected, called = model(x), []
    converted = convert(model)
    for module in model.modules():
        module.register_forward_hook(lambda *args: called.append(args))
    assert relative_error(converted(x), expected) < 1e-5
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert relative_error(converted(x), expected) < 1e-5
    assert not called
    assert is_training_form(converted) == (convert is expand)
    # and it uses what it holds
    with torch.no_grad():
        converted.stage[3].bias.add_(1)
    assert relative_error(converted(x), expected) > 1e-3


@pytest.mark.parametrize('hide', HIDING, ids=lambda hide: hide.__name__)
@pytest.mark.parametrize('convert', [expand, reparameterize])
def test_in_place_as_well(convert, hide):
    model = randomize(Net(nn.Conv2d if convert is expand else OREPAConv2d)).eval()
    hide(model)
    x = images()
    expected = model(x)
    assert convert(model, inplace=True) is model
    assert relative_error(model(x), expected) < 1e-5
    with torch.no_grad():
        model.stage[3].bias.add_(1)
    assert relative_error(model(x), expected) > 1e-3


def test_tensors_of_a_graph_do_not_stop_a_copy():
    """As what a module notes of its last forward pass."""
    model = randomize(Net(OREPAConv2d))
    model.last = model(images())
    assert not reparameterize(model).last.requires_grad
    assert not expand(model, include='head').last.requires_grad
    model.file = open(__file__)  # noqa: SIM115  # nothing can copy that
    with model.file, pytest.raises(TypeError, match=r'Net cannot be copied.*inplace=True'):
        reparameterize(model)


class Lists(nn.Module):
    """Calls what it holds in plain containers."""

    def __init__(self, conv):
        super().__init__()
        self.a, self.b = conv(4, 4, 3, padding=1), conv(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.order, self.pair = [self.a, [self.b]], (self.a, self.b)
        self.by_name = {'a': self.a, self.b: 'b'}
        object.__setattr__(self, 'unregistered', self.b)
        self.call = self.a.forward if conv is nn.Conv2d else self.a.__call__

    def forward(self, x):
        for layer in (*self.pair, self.order[0], self.order[1][0], self.by_name['a'],
                      *list(self.by_name)[1:], self.unregistered):
            x = layer(x)
        return self.norm(self.a(x)) + self.call(x)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('kind', [nn.Conv2d, OREPAConv2d, DBBConv2d])
def test_plain_containers_hold_what_comes_in_place(kind, inplace):
    model = randomize(Lists(kind)).eval()
    x = images(4)
    expected = model(x)
    if kind is nn.Conv2d:
        converted = expand(model, inplace=inplace)
        assert isinstance(converted.a, OREPAConv2d)
        converted(x).sum().backward()
        for layer in (converted.a, converted.b):
            assert all(p.grad is not None for p in layer.parameters())
    else:
        converted = reparameterize(model, inplace=inplace)
        assert type(converted.a) is nn.Conv2d
    assert relative_error(converted(x), expected) < 1e-5
    assert converted.order == [converted.a, [converted.b]]
    assert converted.pair == (converted.a, converted.b)
    assert converted.by_name == {'a': converted.a, converted.b: 'b'}
    assert converted.unregistered is converted.b
    assert converted.call.__self__ is converted.a


# --- what others gave a layer ------------------------------------------------------------

LAYERS = {
    'kxk': lambda: OREPAConv2d(4, 4, 3, padding=1),
    '1x1': lambda: OREPAConv1x1(4, 4, 1),
    'stem': lambda: OREPAStemConv2d(4, 4, 7, padding=3),
    'dbb': lambda: DBBConv2d(4, 4, 3, padding=1),
}


def times_two(module, args, output):
    return output * 2


def other_input(module, args):
    return (args[0] + 1,)


def with_its_own_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x).relu()


def with_its_own_convolution(layer):
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight)


CHANGING = {
    'forward hook': lambda layer: layer.register_forward_hook(times_two),
    'forward pre-hook': lambda layer: layer.register_forward_pre_hook(other_input),
    'hook with keywords': lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, output: output * 2, with_kwargs=True),
    'its own forward': with_its_own_forward,
    'its own convolution': with_its_own_convolution,
}


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize(('change', 'kind'), [
    (change, kind) for change in CHANGING for kind in LAYERS
    if (change, kind) != ('its own convolution', 'dbb')])  # which does not call it
def test_what_changes_the_output_of_a_layer_is_refused(change, kind, inplace):
    model = nn.Sequential(OREPAConv2d(4, 4, 3, padding=1), randomize(LAYERS[kind]())).eval()
    CHANGING[change](model[1])
    before = list(model)
    with pytest.raises(ValueError, match=r'1 \(\w+\) does not give what its convolution gives'):
        reparameterize(model, inplace=inplace)
    assert list(model) == before


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('kind', LAYERS)
def test_what_only_looks_is_kept(kind, inplace):
    model = nn.Sequential(randomize(LAYERS[kind]())).eval()
    seen, gradients = [], []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model[0].register_full_backward_hook(lambda module, *args: gradients.append(type(module)))
    model[0].index, model[0].source = 7, -1  # as ultralytics numbers its layers
    x = images(4)
    expected = model(x)
    deployed = reparameterize(model, inplace=inplace)
    del seen[:]
    y = deployed(x.requires_grad_())
    assert relative_error(y, expected) < 1e-5
    y.sum().backward()
    assert seen == gradients == [nn.Conv2d]
    assert (deployed[0].index, deployed[0].source) == (7, -1)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('how', ['prune', 'weight_norm', 'spectral_norm', 'parametrization'])
def test_a_branch_that_is_computed_is_that_of_now(how, inplace):
    """Before each forward pass they compute a branch anew, and no pass may have been since."""
    layer = randomize(OREPAConv2d(4, 4, 3, padding=1))
    apply = {'prune': lambda name: torch.nn.utils.prune.l1_unstructured(layer, name, 0.5),
             'weight_norm': lambda name: nn.utils.weight_norm(layer, name),
             'spectral_norm': lambda name: nn.utils.spectral_norm(layer, name),
             'parametrization': lambda name: nn.utils.parametrizations.weight_norm(layer, name)}
    apply[how]('weight_orepa_origin')
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(images(4)).square().mean().backward()
    optimizer.step()
    twin = copy.deepcopy(model) if how == 'parametrization' else None
    x = images(4)
    deployed = reparameterize(model, inplace=inplace)
    model = nn.Sequential(layer) if twin is None else twin
    assert model.training
    assert relative_error(deployed(x), model.eval()(x)) < 1e-5
    assert not [name for name in vars(deployed[0]) if 'orepa' in name]
    assert not deployed[0]._forward_pre_hooks


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('weight', [True, False])
@pytest.mark.parametrize('kind', ['kxk', '1x1', 'stem'])
def test_weight_and_bias_are_trained_as_they_were(kind, weight, bias):
    layer = LAYERS[kind]()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(bias if name == 'bias' else weight)
    conv = reparameterize(nn.Sequential(layer))[0]
    assert (conv.weight.requires_grad, conv.bias.requires_grad) == (weight, bias)
    if kind == 'stem':
        return  # too narrow for any kernel
    block = expand(nn.Sequential(conv))[0]
    assert {name: p.requires_grad for name, p in block.named_parameters()} == {
        name: bias if name == 'bias' else weight for name, _ in block.named_parameters()}


# --- ties --------------------------------------------------------------------------------

class Tied(nn.Module):
    """Two convolutions of one weight, with geometries and biases of their own."""

    def __init__(self, size=3, both=False):
        super().__init__()
        self.a = nn.Conv2d(8, 64, size, padding=size // 2)  # wide enough for a stem
        self.b = nn.Conv2d(8, 64, size, padding=2 * (size // 2), dilation=2)
        self.b.weight = self.a.weight
        if both:
            self.b.bias = self.a.bias

    def forward(self, x):
        return self.b(x) * self.a(x)


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('both', [False, True])
@pytest.mark.parametrize('size', [1, 3, 7])
def test_tied_weights_stay_tied_there_and_back(size, both, inplace):
    model = randomize(Tied(size, both)).double()
    x = images(8).double()
    expected = model(x)
    expanded = expand(model, inplace=inplace)
    a, b = expanded.a, expanded.b
    assert isinstance(a, ReparamConv2d)
    assert a is not b
    branches = {name: p for name, p in a.named_parameters() if name != 'bias'}
    assert all(branches[name] is p for name, p in b.named_parameters() if name != 'bias')
    assert (a.bias is b.bias) == both
    assert relative_error(expanded(x), expected) < 1e-10
    optimizer = torch.optim.SGD(expanded.parameters(), lr=0.01)
    expanded(x).square().mean().backward()
    optimizer.step()
    expected = expanded(x)
    back = reparameterize(expanded, inplace=inplace)
    assert back.a.weight is back.b.weight
    assert (back.a.bias is back.b.bias) == both
    assert relative_error(back(x), expected) < 1e-10


def test_layers_that_share_some_branches_only_are_not_tied():
    model = randomize(nn.Sequential(LAYERS['kxk'](), LAYERS['kxk']()))
    model[1].weight_orepa_origin = model[0].weight_orepa_origin
    deployed = reparameterize(model)
    assert deployed[0].weight is not deployed[1].weight
    x = images(4)
    assert relative_error(deployed(x), model(x)) < 1e-5


class Oblique(nn.Module):
    """A weight that a convolution shares with something that has no block."""

    def __init__(self, other):
        super().__init__()
        self.free, self.conv, self.other = (
            nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), other)
        self.other.weight = self.conv.weight


@pytest.mark.parametrize(('other', 'exclude'), [
    (lambda: nn.ConvTranspose2d(4, 4, 1), ()), (lambda: nn.Conv2d(4, 4, 1), 'other'),
    (lambda: nn.Conv2d(4, 4, 1), 'conv')])
def test_what_is_tied_to_something_else_is_left(other, exclude):
    model = Oblique(other())
    expanded = expand(model, exclude=exclude)
    assert type(expanded.conv) is nn.Conv2d
    assert isinstance(expanded.free, OREPAConv2d)
    assert expanded.other.weight is expanded.conv.weight


# --- expand: hooks, methods and attributes -----------------------------------------------

def test_hooks_and_attributes_of_a_convolution_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
    model[0].register_forward_hook(times_two)
    model[0].register_forward_pre_hook(other_input)
    gradients = []
    model[1].register_full_backward_hook(lambda module, *args: gradients.append(module))
    model[1].index, model[1].source = 3, [-1, 6]
    x = images(4)
    for inplace in (False, True):
        expanded = expand(model, inplace=inplace)
        assert len(list(reparam_layers(expanded))) == 2
        if not inplace:
            assert relative_error(expanded(x), model(x)) < 1e-5
        del gradients[:]
        expanded(x).sum().backward()
        assert gradients == [expanded[1]]
        assert (expanded[1].index, expanded[1].source) == (3, [-1, 6])


def doubled(conv):
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


class WithAMethod(nn.Conv2d):
    def kernel(self):
        return self.weight + 1


class OtherWeight(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Called(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class Named(nn.Conv2d):
    """Only a start of its own: the same function."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


def pruned(conv):
    torch.nn.utils.prune.l1_unstructured(conv, 'weight', 0.5)


NO_STOCK = {
    'forward of the instance': doubled, 'convolution of the instance': with_its_own_convolution,
    'pruned': pruned, 'old weight norm': lambda conv: nn.utils.weight_norm(conv),
    'parametrized': lambda conv: nn.utils.parametrizations.weight_norm(conv),
    'a hook on its gradient': lambda conv: conv.weight.register_hook(lambda grad: grad * 2),
    'a hook on its state dict': lambda conv: conv._register_state_dict_hook(lambda *args: None),
    'a method': WithAMethod, 'another weight': OtherWeight, 'another call': Called,
    'lazy': nn.LazyConv2d, 'complex': lambda conv: conv.to(torch.complex64),
}


@pytest.mark.filterwarnings('ignore:Complex modules', 'ignore:`torch.nn.utils.weight_norm`')
@pytest.mark.parametrize('case', NO_STOCK)
def test_what_is_no_stock_convolution_is_left(case):
    change = NO_STOCK[case]
    if case == 'lazy':
        conv = nn.LazyConv2d(4, 3, padding=1)
    elif isinstance(change, type):
        conv = change(4, 4, 3, padding=1)
    else:
        change(conv := nn.Conv2d(4, 4, 3, padding=1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), conv)
    assert [isinstance(layer, ReparamConv2d) for layer in expand(model, inplace=True)] == [
        True, False]
    assert model[1] is conv


def test_a_subclass_that_computes_the_same_is_expanded():
    model = nn.Sequential(Named(4))
    assert isinstance(expand(model)[0], OREPAConv2d)


# --- proofs ------------------------------------------------------------------------------

class Called1(nn.Module):
    def forward(self, x):
        return self.norm(self.conv(x).relu())


class Called2(nn.Module):
    def forward(self, x):
        return self.conv(self.norm(x))


class Called3(nn.Module):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Called4(nn.Module):
    def forward(self, x):
        return self.conv(x) + self.norm(x)


@pytest.mark.parametrize('kind', [nn.Conv2d, OREPAConv2d, DBBConv2d])
@pytest.mark.parametrize('parent', [Called1, Called2, Called3, Called4])
def test_a_norm_registered_behind_a_convolution_may_be_called_elsewhere(parent, kind):
    """Then neither is it folded, nor does it take the bias of a block."""
    model = parent()
    model.conv, model.norm = kind(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
    model = randomize(model).eval()
    x = images(4)
    expected = model(x)
    if kind is nn.Conv2d:
        assert fold_batch_norm(model) == 0
        assert relative_error(model(x), expected) == 0
        return
    for fold_bn in (False, True):
        deployed = reparameterize(model, fold_bn=fold_bn)
        assert type(deployed.norm) is nn.BatchNorm2d
        assert relative_error(deployed(x), expected) < 1e-5


def test_of_several_norms_those_that_follow_are_folded():
    model = Called1()
    model.conv, model.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model.a, model.b = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model.forward = lambda x: model.b(model.a(Called1.forward(model, x)))
    assert fold_batch_norm(randomize(model).eval()) == 1
    assert type(model.b) is FoldedNorm
