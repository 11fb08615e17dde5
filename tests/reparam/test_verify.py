"""Verification sees every mistake, and says in which layer it starts."""

import copy

import pytest
import torch
from helpers import randomize, vary_scales
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from orepa_mm.reparam import reparameterize, verify
from orepa_mm.reparam.verify import scale_relative_error


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
    assert report.passed
    assert {error.dtype for error in report.errors} == {'float32', 'float64'}
    assert report.largest('float64').error < 1e-13  # exact kernels
    assert 1e-9 < max(error.error for error in report.rounding) < 1e-6  # rounded ones
    assert report.complete
    assert report.dtypes() == {'output': ('float32', 'float64')}
    assert report.first_difference is None
    assert before.training
    assert before[3].training
    assert not after.training


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
    report = verify(before, after, batch())
    assert report.first_difference == 'backbone.layer1.1.bn1'
    assert 'backbone.layer1.1.conv1 (on a random input)' in failed_layers(report)


def test_a_model_that_does_not_run(detector):
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2.padding = (0, 0)  # the shortcut has another size then
    report = verify(before, after, batch())
    assert not report.passed
    assert ('features of the deployed form does not run in float32: The size of tensor'
            in report.explain())


def test_a_layer_that_was_not_converted(detector):
    """It computes the same; but deployed it is not."""
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2 = copy.deepcopy(before.backbone.layer2[0].conv2)
    report = verify(before, after, batch())
    assert all(error.passed for error in report.errors)
    assert not report.passed
    assert report.unconverted == (LAYER,)
    assert f'not converted: {LAYER}' in report.explain()


def test_infinities_in_both_forms_are_a_failure(detector):
    before = detector()
    before.backbone.layer1[0].bn1.bias.data[0] = float('inf')
    report = verify(before, reparameterize(before), batch())
    assert not report.passed
    assert report.first_difference == 'backbone.layer1.0.bn1'


def test_a_single_layer():
    layer = randomize(OREPAConv2d(3, 4, 3))
    conv = reparameterize(layer)
    assert verify(layer, conv, images()).passed
    conv.weight.data[0, 0, 0, 0] += 1
    assert 'starts in the layer itself' in verify(layer, conv, images()).explain()


@pytest.mark.parametrize(('factor', 'failing'), [
    (1 + 5e-3, {'outputs', 'rounding', 'layers'}), (1 + 5e-4, {'outputs', 'layers'}),
    (1 + 5e-5, {'layers'}), (1 + 5e-6, {'layers'}), (1 + 1e-7, set())])
def test_how_much_is_let_pass(detector, factor, failing):
    before = detector()
    after = reparameterize(before)
    with torch.no_grad():
        after.bbox_head.retina_reg.weight.mul_(factor)
        after.bbox_head.retina_reg.bias.mul_(factor)
    report = verify(before, after, batch())
    found = {'outputs': report.errors, 'rounding': report.rounding, 'layers': report.layers}
    assert {kind for kind, errors in found.items()
            if not all(error.passed for error in errors)} == failing
    assert report.passed is (not failing)
    # the algebra is not to blame: its kernels are squeezed anew
    assert report.largest('float64').error < 1e-12


def failed_layers(report):
    return {error.name for error in report.layers if not error.passed}


def test_half_precision_is_let_pass_what_it_rounds(detector):
    before = detector().bfloat16()
    after = reparameterize(before)
    assert verify(before, after, batch()).passed
    after.bbox_head.retina_reg.weight.data.mul_(1.25)
    assert not verify(before, after, batch()).passed


def test_every_batch_counts(detector):
    """The largest error of all batches; the layer of the first that differs."""
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2.weight.data.mul_(1.5)
    dark = {**batch(), 'inputs': torch.zeros(1, 3, 64, 64)}
    one, other = (verify(before, after, batches) for batches in ([batch()], [dark]))
    both = verify(before, after, [batch(), dark])
    assert not both.passed
    assert both.first_difference == LAYER
    for dtype in ('float32', 'float64'):
        assert both.largest(dtype).error == max(e.error for e in both.errors if e.dtype == dtype)
        assert both.largest(dtype).error >= other.largest(dtype).error
    assert not one.passed


@pytest.mark.parametrize(('expected', 'found', 'error'), [
    ([1.0, -4.0], [1.0, -3.0], 0.25), ([0.1, 0.2], [0.1, 0.3], 0.5), ([0.0], [0.0], 0.0),
    ([0.0], [1e-9], float('inf')), ([1.0, float('nan')], [1.0, float('nan')], float('inf')),
    ([1.0, float('inf')], [1.0, float('inf')], float('inf')),
    ([1.0, 2.0], [1.0, float('nan')], float('inf')), ([1.0], [1.0, 1.0], float('inf'))])
def test_scale_relative_error(expected, found, error):
    assert scale_relative_error(torch.tensor(expected), torch.tensor(found)) == pytest.approx(error)


def test_outputs_that_are_zero_prove_nothing():
    before = nn.Sequential(OREPAConv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        before[1].weight.zero_()
        before[1].bias.zero_()
    report = verify(before, reparameterize(before), images())
    assert not report.passed
    assert 'that is not zero' in report.explain()


def test_layers_that_no_output_depends_on_are_named(detector):
    before = detector()
    before.auxiliary_head = OREPAConv2d(8, 4, 3)
    report = verify(before, reparameterize(before), batch())
    assert report.passed
    assert report.not_run == ('auxiliary_head',)
    assert 'no raw output depends on: auxiliary_head' in report.explain()


class FailingHead(nn.Module):
    """A head that fails in one of the dtypes, as one that runs out of memory, or has no kernel."""

    def __init__(self, dtypes):
        super().__init__()
        self.conv, self.dtypes = OREPAConv2d(8, 4, 3), dtypes

    def forward(self, x):
        if x[0].dtype in self.dtypes:
            raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return self.conv(x[0])


@pytest.mark.parametrize(('dtypes', 'passed'), [
    ([torch.float32, torch.float64], False), ([torch.float32], False), ([torch.float64], True)])
def test_a_head_that_does_not_run_is_named(detector, dtypes, passed):
    before = detector()
    before.bbox_head = FailingHead(dtypes)
    report = verify(before, reparameterize(before), batch())
    assert report.passed is passed
    assert not report.complete
    named = {(skipped.group, skipped.form, skipped.dtype) for skipped in report.skipped}
    assert named == {('output', form, str(dtype).removeprefix('torch.'))
                     for form in ('training', 'deployed') for dtype in dtypes}
    assert 'output of the deployed form does not run in float' in report.explain()
    assert 'CUDA out of memory. Tried to allocate 2.00 GiB' in report.explain()
    if passed:
        assert 'output in float32' in report.explain()
        assert report.dtypes()['output'] == ('float32',)


def test_a_head_that_does_not_run_and_is_wrong(detector):
    """Nothing may pass because nothing could be compared: not the outputs, not the kernel."""
    before = detector()
    before.bbox_head = FailingHead([torch.float32, torch.float64])
    after = reparameterize(before)
    after.bbox_head.conv.weight.data.mul_(3)
    report = verify(before, after, batch())
    assert not report.passed
    assert failed_layers(report) == {'bbox_head.conv.weight',
                                     'bbox_head.conv (on a random input)'}


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
    assert all(error.passed for error in (*report.errors, *report.rounding))
    assert not report.passed
    assert report.first_difference == '0'
    assert failed_layers(report) == {'0.weight', '0 (on a random input)'}


@pytest.mark.parametrize('fold_bn', [False, True], ids=['plain', 'folded'])
def test_one_channel_that_is_small(fold_bn):
    """An error in it shows beside one a million times larger, as it does behind the BN."""
    before = randomize(nn.Sequential(OREPAConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        before[0].vector[:, 0] *= 1e5
    after = reparameterize(before, fold_bn=fold_bn)
    assert verify(before, after, images()).passed
    after[0].weight.data[1] *= 1.001
    assert failed_layers(verify(before, after, images())) >= {'0.weight'}


def test_every_layer_is_compared_on_its_own(detector):
    """Of our layers and of all others; DBB's bias is in the BN, the folded BN in the kernel."""
    for backbone, fold_bn in (('OREPAResNet', True), ('DBBResNet', False), ('DBBResNet', True)):
        before = detector(backbone)
        after = reparameterize(before, fold_bn=fold_bn)
        report = verify(before, after, batch())
        assert report.passed
        assert report.uncompared == ()
        names = {error.name for error in report.layers}
        assert names >= {name for name, tensor in after.state_dict().items()
                         if tensor.is_floating_point()}
        assert f'{LAYER} (on a random input)' in names
        assert 'neck.fpn_convs.0.conv.weight' in names


def test_blocks_whose_layers_have_other_names_afterwards():
    from mmpretrain.models.backbones.repvgg import RepVGGBlock

    block = randomize(RepVGGBlock(4, 4, conv_cfg=dict(type='OREPA', pointwise=False))).eval()
    before = nn.Sequential(block, nn.Conv2d(4, 2, 1))
    after = reparameterize(before)
    x = torch.randn(2, 4, 8, 8)
    report = verify(before, after, x)
    assert report.passed, report.explain()
    assert '0 (on a random input)' in {error.name for error in report.layers}
    after[0].branch_reparam.weight.data[0, 0, 0, 0] *= 1.01
    assert '0 (on a random input)' in failed_layers(verify(before, after, x))


def test_other_names_are_another_network():
    before = randomize(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), OREPAConv2d(4, 4, 3)))
    after = reparameterize(before)
    after.append(nn.Identity())
    after.add_module('conv', after[2])  # every name is another one
    after[2] = nn.Identity()
    report = verify(before, after, images())
    assert not report.passed
    assert report.uncompared == ('2',)
    assert report.unmatched == ('2', '2.bias', '2.weight', 'conv.bias', 'conv.weight')
    assert 'another network, only one form has or is set up so: 2, 2.bias' in report.explain()


def test_rounding_of_kernels_is_told_from_a_difference():
    """A BN that takes away nearly all of its input multiplies the rounding before it."""
    before = randomize(nn.Sequential(OREPAConv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        before[1].running_mean.copy_(before[0](torch.ones(1, 3, 3, 3)).flatten())
        before[1].running_var.fill_(1e-6)
    report = verify(before, reparameterize(before), 1 + 1e-5 * images())
    assert report.largest('float64').error < 1e-9
    assert 1e-5 < max(error.error for error in report.rounding) < 1e-3
    assert all(error.passed for error in (*report.rounding, *report.layers))
