"""Plain weights that meet a model in training form, at every door; the oracle: the plain model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize, relative_error
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.runner import FlexibleRunner, Runner, load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from orepa_mm.checkpoints import expanded_state_dict, load_weights, require_same_form
from orepa_mm.errors import CheckpointError
from orepa_mm.layers import OREPAConv2d, OREPAStemConv2d, reparam_layers
from orepa_mm.reparam import reparameterize

OREPA = dict(type='OREPA')
RESNET = dict(depth=18, base_channels=8, stem_channels=32)
REPVGG = dict(type='mmpretrain.RepVGG', out_indices=(0, 1, 2, 3), arch=dict(
    num_blocks=[2, 1, 1, 1], width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None))


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr('orepa_mm.checkpoints.expansion.print_log',
                        lambda message, *_: lines.append(message))
    return lines


def backbone(type='ResNet', **kwargs):
    return MODELS.build({'type': type, **RESNET, **kwargs})


def detector_cfg(conv_cfg=None, neck_cfg=None, **kwargs):
    return dict(
        type='RetinaNet', backbone=dict(type='ResNet', **RESNET, conv_cfg=conv_cfg, **kwargs),
        # without a BN: with biases
        neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5,
                  conv_cfg=neck_cfg),
        bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,
                       stacked_convs=1))


def detector(conv_cfg=None, neck_cfg=None, **kwargs):
    return MODELS.build(detector_cfg(conv_cfg, neck_cfg, **kwargs))


def saved(model, path, prefix='', **more):
    """A checkpoint of a model, as a runner writes it."""
    torch.save({'state_dict': {prefix + key: value for key, value in model.state_dict().items()},
                'meta': {}, **more}, path)
    return str(path)


def outputs(model):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()  # of which stock backbones return nothing
        found = model(x)
    return [t for part in found for t in (part if isinstance(part, (list, tuple)) else [part])]


def same(model, plain):
    assert any(True for _ in reparam_layers(model))
    assert max(map(relative_error, outputs(model), outputs(plain))) < 1e-4


def refused(model, load, message):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- the doors ---------------------------------------------------------------------


@pytest.mark.parametrize('door', ['load_state_dict', 'load_checkpoint', 'load_from', 'wrapped',
                                  'test-time augmentation'])
def test_a_whole_detector(door, tmp_path, said):
    plain = randomize(detector())
    model = detector(OREPA, OREPA)
    path = saved(plain, tmp_path / 'plain.pth')
    if door == 'load_state_dict':
        load_state_dict(model, plain.state_dict(), strict=True)
    elif door == 'load_checkpoint':
        load_checkpoint(model, path, strict=True)
    elif door == 'wrapped':
        load_checkpoint(nn.DataParallel(model), path, strict=True)
    elif door == 'test-time augmentation':
        class TTA(BaseTTAModel):
            def merge_preds(self, data_samples_list):
                raise AssertionError
        load_checkpoint(TTA(model), path, strict=True)
    else:
        Runner(model, str(tmp_path / 'work'), load_from=path,
               default_scope='mmdet').load_or_resume()
    same(model, plain)
    (line,) = said
    # the stem, 8 blocks of two, 4 shortcuts; 4 lateral convolutions and 4 behind them
    assert line.startswith('the checkpoint: plain weights were expanded into 29 of the 29 layers')


def test_init_detector(tmp_path, said):
    plain = randomize(detector())
    dataset = dict(type='CocoDataset', metainfo=dict(classes=('a', 'b')))
    cfg = Config(dict(model=detector_cfg(OREPA), test_dataloader=dict(dataset=dataset)))
    model = init_detector(cfg, saved(plain, tmp_path / 'plain.pth'), device='cpu')
    same(model, plain)
    assert '21 of the 21' in said[0]


def test_ema_takes_the_same_branches(tmp_path):
    plain = randomize(detector())
    runner = Runner(detector(OREPA), str(tmp_path / 'work'), default_scope='mmdet',
                    load_from=saved(plain, tmp_path / 'plain.pth'),
                    custom_hooks=[dict(type='EMAHook', strict_load=True)])
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    hook.before_run(runner)
    runner.load_or_resume()
    same(hook.ema_model.module, plain)
    assert all(torch.equal(value, hook.ema_model.module.state_dict()[key])
               for key, value in runner.model.state_dict().items())


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
@pytest.mark.parametrize('kind', ['stock', 'ours'])
def test_init_cfg(kind, prefix, tmp_path, said):
    """MMEngine's `Pretrained` in a stock class, and our backbones, which load strictly."""
    plain = randomize(backbone())
    path = saved(plain, tmp_path / 'plain.pth', prefix or '')
    options = dict(type='OREPAResNet') if kind == 'ours' else dict(conv_cfg=OREPA)
    init_cfg = dict(type='Pretrained', checkpoint=path, **({'prefix': prefix} if prefix else {}))
    model = backbone(**options, init_cfg=init_cfg)
    model.init_weights()
    same(model, plain)
    assert len(said) == 1
    assert (path in said[0]) == (kind == 'ours')


def test_load_weights_stays_strict_about_the_form(tmp_path):
    model = detector(OREPA)
    path = saved(detector(), tmp_path / 'plain.pth')
    refused(model, lambda: load_weights(model, path),
            r'is in plain form, but the model is in training form \(at backbone\.conv1\)(.|\n)*'
            'load_from')


def test_a_runner_does_not_resume_from_plain_weights(tmp_path):
    plain = randomize(detector())
    path = saved(plain, tmp_path / 'plain.pth', optimizer={})
    model = detector(OREPA)
    for resume in (
            Runner(model, str(tmp_path / 'work'), load_from=path, resume=True,
                   default_scope='mmdet').load_or_resume,
            lambda: FlexibleRunner.resume(SimpleNamespace(strategy=SimpleNamespace(
                resume=lambda path, **_: load_checkpoint(model, path))), path)):
        refused(model, resume, 'is in plain form, but the model is in training form(.|\n)*'
                'load_from(.|\n)*optimizer')
    averaged = saved(plain, tmp_path / 'averaged.pth', optimizer={}, ema_state_dict={
        f'module.{key}': value for key, value in plain.state_dict().items()})
    runner = Runner(model, str(tmp_path / 'work'), load_from=averaged, resume=True,
                    default_scope='mmdet', custom_hooks=[dict(type='EMAHook')])
    next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').before_run(runner)
    refused(model, runner.load_or_resume, 'is in training form (.|\n)*load_from')
    load_checkpoint(model, path)  # afterwards as before
    same(model, plain)


# --- what is expanded ----------------------------------------------------------------


def test_the_model_and_the_weights_are_left_alone():
    plain, model = randomize(detector()), detector(OREPA)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = plain.state_dict()
    keys = list(state)
    found = expanded_state_dict(model, state)
    assert list(state) == keys
    assert found._metadata == state._metadata
    assert set(found) == set(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = expanded_state_dict(model, state)  # as for a moving average
    assert all(torch.equal(value, again[key]) for key, value in found.items())
    one, other = (found[f'backbone.layer1.0.conv{n}.weight_orepa_gconv_dw'] for n in (1, 2))
    assert one.any()
    assert not torch.equal(one, other)
    assert found['neck.lateral_convs.0.conv.bias'] is state['neck.lateral_convs.0.conv.bias']


def test_a_model_without_our_layers_is_not_touched():
    plain = randomize(detector())
    for state in (plain.state_dict(), {}, {'neck': 3}):
        assert expanded_state_dict(detector(), state) is state
    state = randomize(detector(OREPA)).state_dict()
    assert expanded_state_dict(detector(OREPA), state) is state


def test_half_and_half(said):
    """A neck that became OREPA for fine-tuning: exactly its layers are expanded."""
    theirs = randomize(detector(OREPA))
    model = detector(OREPA, OREPA)
    load_state_dict(model, theirs.state_dict(), strict=True)
    same(model, theirs)
    assert '8 of the 29' in said[0]
    assert all(torch.equal(value, theirs.state_dict()[key])
               for key, value in model.state_dict().items() if key.startswith('backbone'))


def test_a_layer_twice_or_in_part_is_refused():
    model = detector(OREPA)
    state = randomize(detector(OREPA)).state_dict()
    key = 'backbone.layer1.0.conv1'
    plain = {**state, f'{key}.weight': torch.ones(8, 32, 3, 3)}
    refused(model, lambda: load_state_dict(model, plain), f'{key} twice')
    del plain[f'{key}.vector']
    refused(model, lambda: load_state_dict(model, plain), f'only a part of {key},')


def test_shared_layers_and_a_layer_that_is_the_model():
    """A head that shares its convolutions between levels has their keys once for each."""
    def head(conv):
        shared = conv(4, 4, 3, padding=1)
        return nn.Sequential(nn.Sequential(shared, nn.BatchNorm2d(4)),
                             nn.Sequential(shared, nn.BatchNorm2d(4)))

    for make in (head, lambda conv: conv(4, 6, 3, 2, bias=True)):
        plain, model = randomize(make(nn.Conv2d)).eval(), make(OREPAConv2d)
        load_state_dict(model, plain.state_dict(), strict=True)
        x = torch.randn(2, 4, 9, 9)
        assert relative_error(model.eval()(x), plain(x)) < 1e-5


def test_the_form_in_which_mmpretrain_trains_repvgg(tmp_path):
    """Its 3 x 3 beside 1 x 1 and identity is a plain kernel; one for all of them is not."""
    plain = randomize(MODELS.build(REPVGG))
    model = MODELS.build({**REPVGG, 'type': 'OREPARepVGG'})
    load_state_dict(model, plain.state_dict(), strict=True)
    same(model, plain)
    plain.switch_to_deploy()
    refused(model, lambda: load_state_dict(model, plain.state_dict()),
            'is in plain form, but the model is in training form(.|\n)*deployed RepVGG')


def test_diverse_branch_blocks_are_refused():
    plain = randomize(backbone('DBBResNet'))
    model = backbone('DBBResNet')
    refused(model, lambda: load_state_dict(model, reparameterize(plain).state_dict()),
            'is in plain form, but the model is in training form(.|\n)*DBB')


# --- what does not fit ---------------------------------------------------------------


def test_folded_weights_are_refused(tmp_path):
    def small(conv, bias=False):
        return nn.Sequential(conv(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))

    folded = reparameterize(small(OREPAConv2d).eval(), fold_bn=True)
    for bias in (False, True):
        model = small(OREPAConv2d, bias)
        refused(model, lambda model=model: load_state_dict(model, folded.state_dict()),
                r'is in folded form, but the model is in training form \(at 0\)(.|\n)*plain form')
    # no BN follows that could have been folded, but there is no place for the bias
    model = nn.Sequential(OREPAConv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8))
    refused(model, lambda: load_state_dict(model, folded.state_dict()), 'is in folded form')


def test_a_bias_beside_a_norm_that_is_in_the_file():
    """What a stock model would not take either is left over; the rest fits."""
    plain = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model = nn.Sequential(OREPAConv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    with pytest.raises(RuntimeError, match=r'unexpected key in source state_dict: 0\.bias'):
        load_state_dict(model, plain.state_dict(), strict=True)
    assert relative_error(model[0].weight, plain[0].weight) < 1e-6


def shape_pairs():
    return {'kernel': (OREPAConv2d(3, 8, 3), nn.Conv2d(3, 8, 5)),
            'channels': (OREPAConv2d(4, 8, 3), nn.Conv2d(3, 8, 3)),  # the bias fits
            'classes': (OREPAConv2d(3, 8, 3), nn.Conv2d(3, 6, 3)),
            'stem': (OREPAStemConv2d(3, 32, 7), nn.Conv2d(3, 16, 7))}


@pytest.mark.parametrize('case', ['kernel', 'channels', 'classes', 'stem'])
def test_another_shape_is_named_as_mmengine_does(case, monkeypatch):
    """With other numbers of classes, say: the rest of the weights is loaded and expanded."""
    layer, conv = shape_pairs()[case]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    model = nn.ModuleDict({'new': layer, 'kept': OREPAConv2d(3, 4, 3)})
    plain = randomize(nn.ModuleDict({'new': conv, 'kept': nn.Conv2d(3, 4, 3)}))
    stock = nn.ModuleDict({'new': layer.to_conv2d(), 'kept': nn.Conv2d(3, 4, 3)})
    messages = []
    for target in (stock, model):
        with pytest.raises(RuntimeError, match=r'size mismatch for new\.weight') as error:
            load_state_dict(target, plain.state_dict(), strict=True)
        messages.append([line.replace('torch.Size([', '(').replace('])', ')').strip()
                         for line in str(error.value).splitlines() if 'size mismatch' in line])
    assert [line.rstrip('.') for line in messages[0]] == [line.rstrip('.') for line in messages[1]]
    load_state_dict(model, plain.state_dict())  # MMEngine warns, and goes on
    assert relative_error(model['kept'].weight, plain['kept'].weight) < 1e-6
    for key, value in layer.state_dict().items():
        fits = key == 'bias' and case in ('channels', 'kernel')
        assert torch.equal(value, conv.bias if fits else before[key])


def test_another_architecture_is_an_error_of_our_backbones(tmp_path):
    path = saved(backbone(depth=50), tmp_path / 'deeper.pth')
    for depth, message in ((18, r'size mismatch for layer1\.0\.conv1\.weight'),
                           (101, r'it has no layer3\.6\.conv1')):
        model = backbone('OREPAResNet', depth=depth,
                         init_cfg=dict(type='Pretrained', checkpoint=path))
        refused(model, model.init_weights, message)


BAD = {
    'nan': (lambda t: t.fill_(float('nan')), 'holds values that are not finite'),
    'inf': (lambda t: t.index_fill_(0, torch.tensor([1]), float('-inf')),
            'holds values that are not finite'),
    'integers': (lambda t: t.to(torch.int8), 'is of type torch.int8, where OREPAConv'),
    'sparse': (lambda t: t.to_sparse(), 'is no ordinary tensor'),
    'meta': (lambda t: t.to('meta'), 'is no ordinary tensor'),
}


@pytest.mark.parametrize('damage', BAD)
@pytest.mark.parametrize('key', ['backbone.layer2.1.conv1.weight', 'neck.fpn_convs.0.conv.bias'])
def test_damaged_kernels_are_named(key, damage):
    spoil, message = BAD[damage]
    model = detector(OREPA, OREPA)
    state = dict(randomize(detector()).state_dict())
    state[key] = spoil(state[key].clone())
    refused(model, lambda: load_state_dict(model, state), f'^{key} {message}')


@pytest.mark.parametrize('door', ['stock', 'ours'])
def test_a_stem_that_is_too_narrow_says_by_how_much(door, tmp_path):
    path = saved(randomize(backbone(stem_channels=8)), tmp_path / 'narrow.pth')
    options = dict(conv_cfg=OREPA) if door == 'stock' else dict(type='OREPAResNet')
    model = backbone(**options, stem_channels=8,
                     init_cfg=dict(type='Pretrained', checkpoint=path))
    refused(model, model.init_weights, r'conv1\.weight cannot be expanded: this OREPAStemConv2d .*'
            r'miss it by \d\.\de-0\d of its largest value')


def test_a_bias_that_is_missing_is_named():
    model = nn.Sequential(OREPAConv2d(3, 8, 3))
    state = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)).state_dict()
    refused(model, lambda: load_state_dict(model, state), r'there is no 0\.bias')
    require_same_form(model, expanded_state_dict(model, {**state, '0.bias': torch.zeros(8)}))


def test_half_precision_weights():
    plain = randomize(detector())
    state = {key: value.half() for key, value in plain.state_dict().items()}
    model, stock = detector(OREPA), copy.deepcopy(plain)
    load_state_dict(model, state)
    load_state_dict(stock, state)
    same(model, stock)
