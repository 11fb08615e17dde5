"""Verification sees every mistake, and says in which layer it starts."""

import copy
import functools
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize, vary_scales
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from orepa_mm.reparam import expand, reparameterize, verify
from orepa_mm.reparam.raw_outputs import scale_relative_error
from orepa_mm.reparam.verify import TENSOR_UNITS, TOLERANCE


def model():
    return randomize(nn.Sequential(
        OREPAStemConv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        OREPAConv2d(8, 8, 3, padding=1), nn.Sequential(OREPAConv1x1(8, 4))))


def images():
    return torch.randn(2, 3, 16, 16)


def test_it_passes_in_whatever_mode():
    before = model().train()
    after = reparameterize(before)
    report = verify(before, after.eval(), [images(), {'inputs': images()}])
    assert report.complete, report.explain()
    assert report.largest().error < 1e-5
    # the names of every tensor that the model after has, and no other
    assert {error.name for error in report.tensors} == {
        name for name in after.state_dict() if not name.endswith('num_batches_tracked')}
    assert max(error.error for error in report.tensors) == 0  # squeezed by the same code
    assert report.first_difference is None
    assert before.training
    assert before[3].training
    assert not after.training


def test_each_form_runs_once_a_batch_in_float32(monkeypatch):
    calls, forward = [], nn.ReLU.forward

    def noted(self, x):
        calls.append(x.dtype)
        return forward(self, x)

    before = model()
    after = reparameterize(before)
    monkeypatch.setattr(nn.ReLU, 'forward', noted)
    assert verify(before, after, [images(), images()]).passed
    assert calls == [torch.float32] * 4


def test_without_inputs_nothing_is_proven():
    report = verify(model(), reparameterize(model()), [])
    assert not report.passed
    assert 'no input' in report.explain()


@pytest.fixture
def detector():
    """A RetinaNet of 16 conv layers whose weights are as after some training."""
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)

    def build(backbone='OREPAResNet'):
        model = MODELS.build(dict(
            type='RetinaNet', backbone=dict(type=backbone, depth=18, base_channels=8),
            neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
            bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,
                           stacked_convs=1)))
        model.init_weights()
        vary_scales(model)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
        return model.eval()

    return build


def batch():
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo={'img_shape': (64, 64), 'batch_input_shape': (64, 64)})
    return {'inputs': torch.randn(1, 3, 64, 64), 'data_samples': [sample]}


LAYER = 'backbone.layer2.0.conv2'


def lose_branch(layer):
    layer.vector.data[0].zero_()


def exchange_scales(layer):
    layer.vector.data.copy_(layer.vector.data[[1, 0, *range(2, len(layer.vector))]])


#: What goes wrong before the conversion, in the branches.
IN_BRANCHES = {'a dropped branch': lose_branch, 'a wrong scale row': exchange_scales}
#: What goes wrong in the converted model, and the layer that is to be named.
AFTERWARDS = {
    'a lost BN bias': (lambda m: m.backbone.layer2[0].bn2.bias.data.zero_(),
                       'backbone.layer2.0.bn2'),
    'lost BN statistics': (lambda m: m.backbone.layer2[0].bn2.running_mean.zero_(),
                           'backbone.layer2.0.bn2'),
    'padding off by one': (lambda m: setattr(m.backbone.layer2[0].conv2, 'padding', (0, 0)),
                           LAYER),
    'stride of another layer': (lambda m: setattr(m.backbone.conv1, 'stride', (1, 1)),
                                'backbone.conv1'),
    'a flipped kernel': (lambda m: m.backbone.layer2[0].conv2.weight.data.copy_(
        m.backbone.layer2[0].conv2.weight.data.flip(2, 3)), LAYER),
    'not a number': (lambda m: m.backbone.layer2[0].conv2.weight.data[0].fill_(float('nan')),
                     LAYER),
    'a wrong shortcut': (lambda m: m.backbone.layer2[0].downsample[0].weight.data.mul_(1.01),
                         'backbone.layer2.0.downsample.0'),
    'a wrong neck': (lambda m: m.neck.fpn_convs[1].conv.bias.data.add_(1.0),
                     'neck.fpn_convs.1.conv'),
    'a wrong head': (lambda m: m.bbox_head.retina_reg.weight.data.mul_(1.01),
                     'bbox_head.retina_reg'),
}


@pytest.mark.parametrize('fold_bn', [False, True], ids=['plain', 'folded'])
@pytest.mark.parametrize('mistake', IN_BRANCHES)
def test_mistakes_of_the_squeeze(detector, mistake, fold_bn):
    before = detector()
    wrong = copy.deepcopy(before)
    IN_BRANCHES[mistake](wrong.get_submodule(LAYER))
    report = verify(before, reparameterize(wrong, fold_bn=fold_bn), batch())
    assert not report.passed
    assert report.first_difference == LAYER
    assert f'starts in the layer {LAYER}' in report.explain()
    assert 'in float32: ' in report.explain()


@pytest.mark.parametrize('mistake', AFTERWARDS)
def test_mistakes_of_the_conversion(detector, mistake):
    before = detector()
    assert verify(before, reparameterize(before), batch()).passed
    mutate, layer = AFTERWARDS[mistake]
    after = reparameterize(before)
    with torch.no_grad():
        mutate(after)
    report = verify(before, after, batch())
    assert not report.passed
    assert report.first_difference == layer


@pytest.mark.parametrize('backbone', ['OREPAResNet', 'DBBResNet'])
def test_mistakes_of_the_folding(detector, backbone):
    """A convolution that took over the bias of its BN is compared together with it."""
    before = detector(backbone)
    for name in (LAYER, 'backbone.layer3.1.conv1'):
        after = reparameterize(before, fold_bn=True)
        assert verify(before, after, batch()).passed
        after.get_submodule(name).bias.data.zero_()
        report = verify(before, after, batch())
        assert not report.passed
        assert report.first_difference == name


def test_a_bias_that_became_a_norm(detector):
    before = detector('DBBResNet')
    after = reparameterize(before)
    assert verify(before, after, batch()).passed
    after.backbone.layer1[1].bn1.bias.data.zero_()
    assert verify(before, after, batch()).first_difference == 'backbone.layer1.1.bn1'


def test_a_model_that_does_not_run(detector):
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2.padding = (0, 0)  # the shortcut has another size then
    report = verify(before, after, batch())
    assert not report.passed
    assert 'the deployed form does not run: The size of tensor' in report.explain()


def test_a_layer_that_was_not_converted(detector):
    """It computes the same; but deployed it is not."""
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2 = copy.deepcopy(before.backbone.layer2[0].conv2)
    report = verify(before, after, batch())
    assert all(error.passed for error in report.errors)
    assert not report.passed
    assert report.unconverted == (LAYER,)
    assert f'not converted:\n  {LAYER}' in report.explain()


def test_infinities_in_one_form_are_a_failure(detector):
    before = detector()
    after = reparameterize(before)
    after.backbone.layer1[0].bn1.bias.data[0] = float('inf')
    report = verify(before, after, batch())
    assert not report.passed
    assert report.first_difference == 'backbone.layer1.0.bn1'


def test_a_single_layer():
    layer = randomize(OREPAConv2d(3, 4, 3))
    conv = reparameterize(layer)
    assert verify(layer, conv, images()).passed
    conv.weight.data[0, 0, 0, 0] += 1
    assert 'starts in the layer itself' in verify(layer, conv, images()).explain()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('fold_bn', [False, True], ids=['plain', 'folded'])
def test_a_tensor_spoiled_by_a_hundred_tolerances_fails(dtype, fold_bn):
    """Of each tensor one channel, as little as the type can say of it; one unit passes."""
    before = model().to(dtype)
    after = reparameterize(before, fold_bn=fold_bn)
    unit = torch.finfo(dtype).eps
    for name, parameter in after.named_parameters():
        part, original = parameter.data[-1:], parameter.detach().clone()
        for units, passed in ((1, True), (100 * TENSOR_UNITS, False)):
            size = parameter.abs().max() if parameter.dim() == 1 else part.abs().max()
            part.add_(units * unit * size * (part.abs() == part.abs().max()))
            report = verify(before, after, images().to(dtype))
            assert (name not in failed_tensors(report)) == passed, (name, units)
            parameter.data.copy_(original)


@pytest.mark.parametrize(('factor', 'passed'), [(1 + 100 * TOLERANCE, False), (1 + 1e-6, True)])
def test_an_output_off_by_a_hundred_tolerances_fails(factor, passed):
    """Where every tensor agrees: what differs is a hook."""
    before = model().eval()
    after = reparameterize(before)
    after[0].register_forward_hook(lambda module, args, output: output * factor)
    report = verify(before, after, images())
    assert all(error.passed for error in report.tensors)
    assert not report.differences
    assert report.passed is passed
    assert ('something else acts on the outputs' in report.explain()) is not passed


def failed_tensors(report):
    return {error.name for error in report.tensors if not error.passed}


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_let_pass_what_it_rounds(detector, dtype):
    before = detector()
    after = reparameterize(before).to(dtype)
    assert verify(before, after, batch()).passed
    before.to(dtype)
    after = reparameterize(before)
    assert verify(before, after, batch()).passed
    after.bbox_head.retina_reg.weight.data.mul_(1.25)
    assert not verify(before, after, batch()).passed


def test_every_batch_counts(detector):
    """The largest error of all batches."""
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2.weight.data.mul_(1.5)
    bright = batch()
    dark = {**bright, 'inputs': torch.zeros(1, 3, 64, 64)}
    one, other, both = (verify(before, after, batches)
                        for batches in ([bright], [dark], [bright, dark]))
    assert not both.passed
    assert both.first_difference == LAYER
    assert both.largest().error == max(one.largest().error, other.largest().error)


@pytest.mark.parametrize(('expected', 'found', 'error'), [
    ([1.0, -4.0], [1.0, -3.0], 0.25), ([0.1, 0.2], [0.1, 0.3], 0.5), ([0.0], [0.0], 0.0),
    ([0.0], [1e-9], float('inf')), ([1.0, float('nan')], [1.0, float('nan')], float('inf')),
    ([1.0, float('inf')], [1.0, float('inf')], 0.0),
    ([2.0, -float('inf')], [1.0, -float('inf')], 0.5),
    ([1.0, float('inf')], [1.0, -float('inf')], float('inf')),
    ([1.0, float('inf')], [float('inf'), 1.0], float('inf')), ([1 + 1j], [1 - 1j], 2**0.5),
    ([1.0, 2.0], [1.0, float('nan')], float('inf')), ([1.0], [1.0, 1.0], float('inf'))])
def test_scale_relative_error(expected, found, error):
    assert scale_relative_error(torch.tensor(expected), torch.tensor(found)) == pytest.approx(error)


@pytest.mark.parametrize('value', [-float('inf'), float('inf')])
def test_what_is_masked_in_both_forms_is_equal(value):
    """As the scores of places that are no proposals; what is not masked counts."""
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = OREPAConv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).index_fill(2, torch.tensor([0]), value)

    before = randomize(Masked()).eval()
    after = reparameterize(before)
    assert verify(before, after, images()).complete
    after.conv.register_forward_hook(lambda module, args, output: output * 1.01)
    assert not verify(before, after, images()).passed


@pytest.mark.parametrize('value', [0.0, float('inf')])
def test_outputs_that_are_all_the_same_prove_nothing(value):
    before = nn.Sequential(OREPAConv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        before[1].weight.zero_()
        before[1].bias.fill_(value)
    report = verify(before, reparameterize(before), images())
    assert not report.passed
    assert report.dead == ('output',)
    assert 'that is not zero' in report.explain()


def test_layers_that_no_output_depends_on_are_named(detector):
    before = detector()
    before.auxiliary_head = OREPAConv2d(8, 4, 3)
    report = verify(before, reparameterize(before), batch())
    assert report.passed
    assert not report.complete
    assert report.not_run == ('auxiliary_head',)
    assert 'no raw output depends on:\n  auxiliary_head' in report.explain()


class FailingHead(nn.Module):
    """A head that fails, as one that runs out of memory, or has no kernel."""

    def __init__(self):
        super().__init__()
        self.conv = OREPAConv2d(8, 4, 3)

    def forward(self, x):
        raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB\nmore')


def test_a_head_that_does_not_run_is_named(detector):
    """What ran before it is compared; nothing passes because nothing could be compared."""
    before = detector()
    before.bbox_head = FailingHead()
    after = reparameterize(before)
    report = verify(before, after, batch())
    assert not report.passed
    assert report.skipped == tuple(
        f'the {form} form does not run: CUDA out of memory. Tried to allocate 2.00 GiB'
        for form in ('deployed', 'training'))
    assert report.not_run == ('bbox_head.conv',)
    assert {error.name.split('[')[0] for error in report.errors} == {'backbone', 'neck'}
    assert all(error.passed for error in (*report.errors, *report.tensors))
    after.bbox_head.conv.weight.data.mul_(3)
    assert failed_tensors(verify(before, after, batch())) == {'bbox_head.conv.weight'}


def test_kernels_where_the_signal_has_died():
    """The outputs of both forms are those of the last bias."""
    before = randomize(nn.Sequential(*(OREPAConv2d(3, 3, 3, padding=1) for _ in range(3))))
    with torch.no_grad():
        before[1].bias.fill_(1.0)
        before[2].bias.fill_(1.0)
        for layer in before[1:]:
            layer.vector.mul_(1e-12)
    after = reparameterize(before)
    assert verify(before, after, images()).passed
    after[0].weight.data.mul_(1.3)
    report = verify(before, after, images())
    assert all(error.passed for error in report.errors)
    assert not report.passed
    assert report.first_difference == '0'
    assert failed_tensors(report) == {'0.weight'}


@pytest.mark.parametrize('fold_bn', [False, True], ids=['plain', 'folded'])
def test_one_channel_that_is_small(fold_bn):
    """An error in it shows beside one a million times larger, as it does behind the BN."""
    before = randomize(nn.Sequential(OREPAConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        before[0].vector[:, 0] *= 1e5
    after = reparameterize(before, fold_bn=fold_bn)
    assert verify(before, after, images()).passed
    after[0].weight.data[1] *= 1.001
    assert failed_tensors(verify(before, after, images())) == {'0.weight'}


@pytest.mark.parametrize('start', ['published', 'zero'])
@pytest.mark.parametrize('scale', [0.0, 1e-4, 1.0])
def test_a_kernel_that_branches_add_up_to_is_as_exact_as_they_are(scale, start):
    """Expanded, it is what is left of branches that cancel, and has their rounding."""
    plain = nn.Sequential(nn.Conv2d(3, 32, 7), nn.ReLU(), nn.Conv2d(32, 4, 3))
    plain[2].weight.data.mul_(scale)
    plain[0].weight.data.mul_(torch.logspace(-3, 0, 32)[:, None, None, None])
    before = expand(plain, dict(type='OREPA', start=start))
    report = verify(before, plain, images())
    assert report.passed, report.explain()
    for name in ('0.weight', '2.weight'):
        weight = plain.get_parameter(name)
        original = weight.detach().clone()
        weight.data[0, 0, 0, 0] += 1e-4
        assert failed_tensors(verify(before, plain, images())) == {name}
        weight.data.copy_(original)


def test_every_tensor_is_compared(detector):
    """Of our layers and of all others; DBB's bias is in the BN, the folded BN in the kernel."""
    for backbone, fold_bn in (('OREPAResNet', True), ('DBBResNet', False), ('DBBResNet', True)):
        before = detector(backbone)
        after = reparameterize(before, fold_bn=fold_bn)
        report = verify(before, after, batch())
        assert report.passed
        assert {error.name for error in report.tensors} >= {
            name for name, tensor in after.state_dict().items() if tensor.is_floating_point()}


def test_blocks_whose_layers_have_other_names_afterwards():
    from mmpretrain.models.backbones.repvgg import RepVGGBlock

    block = randomize(RepVGGBlock(4, 4, conv_cfg=dict(type='OREPA', pointwise=False))).eval()
    before = nn.Sequential(block, nn.Conv2d(4, 2, 1))
    after = reparameterize(before)
    x = torch.randn(2, 4, 8, 8)
    report = verify(before, after, x)
    assert report.passed, report.explain()
    after[0].branch_reparam.weight.data[0, 0, 0, 0] *= 1.01
    assert failed_tensors(verify(before, after, x)) == {'0.branch_reparam.weight'}


def test_other_names_are_another_network():
    before = randomize(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), OREPAConv2d(4, 4, 3)))
    after = reparameterize(before)
    after.append(nn.Identity())
    after.add_module('conv', after[2])  # every name is another one
    after[2] = nn.Identity()
    report = verify(before, after, images())
    assert not report.passed
    assert report.differences == {
        '2': 'Conv2d became Identity', '3': 'only the deployed form has it',
        'conv': 'only the deployed form has it'}
    assert 'another network:\n  2: Conv2d became Identity' in report.explain()


def test_a_model_that_amplifies_rounding_is_told_from_another_one():
    """A BN that takes away nearly all of its input multiplies the rounding before it."""
    before = randomize(nn.Sequential(OREPAConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        before[1].running_mean.copy_(before[0](torch.ones(1, 3, 3, 3)).flatten())
        before[1].running_var.fill_(1e-6)
    report = verify(before, reparameterize(before), 1 + 1e-5 * images())
    assert all(error.passed for error in report.tensors)
    assert not report.passed
    assert 'the model amplifies the rounding of float32' in report.explain()


# --- the same tree ----------------------------------------------------------------


class Scale:
    """An object that is no module and holds a tensor, as an anchor generator does."""

    def __init__(self):
        self.values, self.options = [torch.tensor([1.0, 2.0])], {'clip': SimpleNamespace(at=3)}


class Everything(nn.Module):
    """What a model can hold beside the tensors of its state dict; the output depends on little."""

    def __init__(self):
        super().__init__()
        self.conv = OREPAConv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.up = nn.Upsample(scale_factor=2)
        self.aux = nn.Sequential(OREPAConv2d(8, 4, 3, padding=1), nn.ReLU(), nn.GELU())
        self.threshold, self._hidden, self.drop_path_rate = 10.0, 'a', 0.1
        self.scale, self.listed = Scale(), [nn.Conv2d(3, 3, 1)]
        self.made = functools.partial(torch.clamp, max=6)
        limit = 5
        self.function = lambda x: x.clamp(max=limit)
        self.test_cfg = dict(score_thr=0.5, nms=dict(type='nms', iou=0.5))
        self.register_buffer('mean', torch.tensor([1.0, 2.0]), persistent=False)
        self.register_buffer('index', torch.arange(4))

    def forward(self, x):
        self.shape = tuple(x.shape)  # what a forward pass leaves behind
        self.grid = torch.arange(float(x.shape[-1]))
        return self.up(self.drop(self.act(self.norm(self.conv(x)))))


def put(name, value):
    """A change of one attribute; the name may have dots."""
    def change(model):
        holder, _, last = name.rpartition('.')
        setattr(functools.reduce(getattr, filter(None, holder.split('.')), model), last,
                value(model) if callable(value) and not isinstance(value, nn.Module) else value)
    return change


OTHERS = {
    'another activation': (put('act', nn.ReLU6()), 'act', 'ReLU became ReLU6'),
    'no activation': (put('act', nn.Identity()), 'act', 'ReLU became Identity'),
    'an activation that is not reached': (lambda m: m.aux.__setitem__(1, nn.Sigmoid()), 'aux.1',
                                          'ReLU became Sigmoid'),
    'a setting of an activation': (put('aux.2.approximate', 'tanh'), 'aux.2',
                                   "approximate: 'none' became 'tanh'"),
    'the mode of a layer': (put('up.mode', 'bilinear'), 'up', "mode: 'nearest' became 'bilinear'"),
    'eps': (put('norm.eps', 1e-2), 'norm', 'eps'),
    'no statistics': (put('norm.track_running_stats', False), 'norm', 'track_running_stats'),
    'a stride': (put('aux.0.stride', (2, 2)), 'aux.0', 'stride'),
    'padding mode': (put('conv.padding_mode', 'reflect'), 'conv', 'padding_mode'),
    'another kind of convolution': (lambda m: m.aux.__setitem__(0, nn.ConvTranspose2d(8, 4, 3)),
                                    'aux.0', 'Conv2d became ConvTranspose2d'),
    'a bias': (put('conv.bias', None), 'conv', 'only one form has bias'),
    'a module less': (lambda m: delattr(m, 'aux'), 'aux', 'only the training form has it'),
    'a module more': (put('more', nn.Conv2d(1, 1, 1)), 'more', 'only the deployed form has it'),
    'an attribute': (put('threshold', 9.0), '', 'threshold: 10.0 became 9.0'),
    'a private attribute': (put('_hidden', 'b'), '', '_hidden'),
    'an attribute more': (put('factor', 2), '', "factor: '(absent)' became 2"),
    'a tensor inside an object': (put('scale.values', [torch.tensor([1.0, 2.1])]), '', 'scale'),
    'a number inside an object': (put('scale.options', {'clip': SimpleNamespace(at=4)}), '',
                                  'scale'),
    'a module inside a list': (lambda m: m.listed[0].weight.data.mul_(2), '', 'listed'),
    'a partial function': (put('made', lambda m: functools.partial(torch.clamp, max=7)), '',
                           'made'),
    'a closure': (put('function', lambda m: (lambda limit: lambda x: x.clamp(max=limit))(5)), '',
                  'function'),
    'a method on the instance': (put('up.forward', lambda m: m.act.forward), 'up', 'forward'),
    'a setting deep down': (lambda m: m.test_cfg['nms'].update(iou=0.6), '', 'test_cfg'),
}


@pytest.mark.parametrize('other', OTHERS)
def test_another_network_is_not_passed(other):
    """Where no output shows it, and where one does."""
    before = randomize(Everything()).eval()
    after = reparameterize(before)
    assert verify(before, after, images()).passed
    change, name, text = OTHERS[other]
    change(after)
    report = verify(before, after, images())
    assert not report.passed
    assert text in report.differences[name]
    assert report.first_difference == (name or 'itself')
    assert text in report.explain()


@pytest.mark.parametrize('name', ['mean', 'index', 'norm.running_var', 'aux.0.bias'])
def test_every_kind_of_tensor_counts(name):
    """Buffers that a state dict does not hold, and whole numbers, too."""
    before = randomize(Everything()).eval()
    after = reparameterize(before)
    tensor = functools.reduce(getattr, name.split('.'), after)
    tensor.data.copy_(tensor + 1)
    report = verify(before, after, images())
    assert not report.passed
    assert failed_tensors(report) == {name}


@pytest.mark.parametrize('change', [
    put('act.inplace', False), put('norm.momentum', 0.01), put('drop.p', 0.5),
    put('drop', nn.Identity()), put('drop_path_rate', 0.3),
    put('norm.num_batches_tracked', torch.tensor(7)),
    lambda m: m.__setattr__('norm', nn.SyncBatchNorm.convert_sync_batchnorm(m.norm)),
    put('function', lambda m: copy.deepcopy(m.function)),
    put('scale', lambda m: copy.deepcopy(m.scale)),
    lambda m: m(torch.rand(1, 3, 32, 32)),
    lambda m: m.requires_grad_(False), lambda m: m.train()],
    ids=['inplace', 'momentum', 'dropout', 'identity', 'drop path', 'batches', 'SyncBN', 'function',
         'scale', 'a pass', 'frozen', 'train'])
def test_what_no_output_in_eval_mode_depends_on_does_not_count(change):
    before = randomize(Everything()).eval()
    after = reparameterize(before)
    change(after)
    report = verify(before, after, images())
    assert report.passed, report.explain()


def test_what_was_trained_in_between_is_no_other_network():
    """Attributes that hold results of a training step, with their graph, neither stop nor count."""
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = OREPAConv2d(3, 4, 3), {}

        def forward(self, x):
            self.last = {'y': [self.conv(x)]}
            return self.last['y'][0]

    before = randomize(Keeps())
    after = reparameterize(before)
    before(images()).sum().backward()
    assert verify(before, after, images()).passed


def test_what_cannot_be_copied_is_named():
    before = nn.Sequential(model(), nn.ReLU())
    after = reparameterize(before)
    before[0][2].lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Sequential cannot be copied, for its 0\.2\.lock \(cannot "
                                        r"pickle '_thread\.lock' object\): take out"):
        verify(before, after, images())
