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
    assert report.largest('float64').error < 1e-6
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
    assert verify(before, after, batch()).first_difference == 'backbone.layer1.1.conv1'


def test_a_model_that_does_not_run(detector):
    before = detector()
    after = reparameterize(before)
    after.backbone.layer2[0].conv2.padding = (0, 0)  # the shortcut has another size then
    assert 'does not run: The size of tensor' in verify(before, after, batch()).explain()


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
    (1 + 5e-4, {'float32', 'float64'}), (1 + 5e-5, {'float64'}), (1 + 2e-6, set())])
def test_how_much_is_let_pass(detector, factor, failing):
    before = detector()
    after = reparameterize(before)
    with torch.no_grad():
        after.bbox_head.retina_reg.weight.mul_(factor)
        after.bbox_head.retina_reg.bias.mul_(factor)
    report = verify(before, after, batch())
    assert {error.dtype for error in report.errors if not error.passed} == failing
    assert report.passed is (not failing)


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
