"""A checkpoint of one form is refused by a model of another, wherever MMEngine loads."""

import copy

import mmengine.runner
import pytest
import torch
from helpers import golden, needs_golden, randomize
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint_to_model, load_state_dict
from torch import nn

from orepa_mm.checkpoints import load_weights, require_same_form
from orepa_mm.errors import CheckpointError
from orepa_mm.reparam import reparameterize

NECK = dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5)
HEAD = dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1)
REPVGG = dict(out_indices=(0, 1, 2, 3), arch=dict(
    num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None))
BACKBONES = {
    'OREPAResNet': dict(depth=18, base_channels=8, stem_channels=32),
    'DBBResNet': dict(depth=18, base_channels=8),
    'OREPARepVGG': REPVGG,
}
STOCK = {'OREPAResNet': 'ResNet', 'DBBResNet': 'ResNet', 'OREPARepVGG': 'mmpretrain.RepVGG'}


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


def detector(backbone, form, **kwargs):
    """A detector of either form; the plain ones are the stock ones."""
    cfg = dict(type=backbone, **BACKBONES[backbone], **kwargs)
    if form != 'training':
        cfg['type'] = STOCK[backbone]
        if backbone == 'OREPARepVGG':
            cfg['deploy'] = True
    model = dict(type='RetinaNet', backbone=cfg, neck=NECK, bbox_head=HEAD)
    if form == 'folded':
        model = {**model, 'type': 'BNFolded', 'model_type': 'RetinaNet'}
    return MODELS.build(copy.deepcopy(model))


def weights(backbone, form):
    model = randomize(detector(backbone, 'training'))
    if form != 'training':
        model = reparameterize(model, fold_bn=form == 'folded')
    return model.state_dict()


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


FORMS = ('training', 'plain', 'folded')
PAIRS = [(backbone, theirs, ours) for backbone in BACKBONES for theirs in FORMS for ours in FORMS
         # a deployed RepVGG has no BN to fold, nor has RetinaNet
         if not (backbone == 'OREPARepVGG' and 'folded' in (theirs, ours))]
COMMANDS = {'training': 'mim run orepa_mm reparam', 'plain': 'config that lies beside',
            'folded': 'config that lies beside'}


@pytest.mark.parametrize(('backbone', 'theirs', 'ours'), PAIRS)
def test_every_pair_of_forms(backbone, theirs, ours, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    state = weights(backbone, theirs)
    # a training form is written by the runner, the others by `save_deployed`
    meta = {} if theirs == 'training' else {'form': theirs}
    torch.save({'state_dict': dict(state), 'meta': meta}, path)
    model = detector(backbone, ours)
    before = snapshot(model)
    # MMEngine's function behind load_from, init_detector and the inferencers; and our tools'
    loads = [lambda: load_weights(model, path)]
    expands = (backbone, theirs, ours) == ('OREPAResNet', 'plain', 'training')
    if not expands:  # see test_expansion.py
        loads.append(lambda: load_checkpoint(model, str(path)))
    if not expands:
        loads.append(lambda: mmengine.runner.load_state_dict(model, state))
    for load in loads:
        if theirs == ours:
            load()
            assert all(torch.equal(value, state[key])
                       for key, value in model.state_dict().items())
        else:
            with pytest.raises(CheckpointError) as error:
                load()
            assert f'is in {theirs} form, but the model is in {ours} form' in str(error.value)
            assert COMMANDS[theirs] in str(error.value)
            assert all(torch.equal(value, before[key])
                       for key, value in model.state_dict().items())


@pytest.mark.parametrize('prefix', [None, 'backbone'])
def test_a_folded_form_is_known_however_it_is_loaded(prefix, tmp_path):
    """By its keys: without what the file says of it, and in a part of it."""
    torch.save(dict(weights('OREPAResNet', 'folded')), tmp_path / 'folded.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'folded.pth'))
    model = detector('OREPAResNet', 'plain', init_cfg=init_cfg | dict(prefix=prefix))
    if prefix is None:  # of the whole detector
        model = detector('OREPAResNet', 'plain')
        model.init_cfg = init_cfg
    with pytest.raises(CheckpointError, match='is in folded form, but the model is in plain form'):
        model.init_weights()


def of_version_0_2_0(state):
    """It left no key of a folded BN, only `meta` of the file."""
    return {key: value for key, value in state.items() if not key.endswith('folded_norm')}


def test_files_of_version_0_2_0_are_told_by_their_meta(tmp_path):
    state = of_version_0_2_0(weights('OREPAResNet', 'folded'))
    assert len(state) < len(weights('OREPAResNet', 'folded'))
    torch.save({'state_dict': state, 'meta': {'form': 'folded'}}, tmp_path / 'model.pth')
    for load in (load_weights, lambda model, path: load_checkpoint(model, str(path), strict=True)):
        model = detector('OREPAResNet', 'folded')
        load(model, tmp_path / 'model.pth')
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
        for ours in ('plain', 'training'):
            with pytest.raises(CheckpointError, match='is in folded form'):
                load(detector('OREPAResNet', ours), tmp_path / 'model.pth')
    model = detector('OREPAResNet', 'folded')
    assert not model.load_state_dict(state, strict=True).missing_keys


def test_a_folded_form_of_which_nothing_is_said_is_left_to_mmengine():
    """Its keys may be those of any network without BN."""
    state = of_version_0_2_0(weights('OREPAResNet', 'folded'))
    model = detector('OREPAResNet', 'plain')
    with pytest.raises(RuntimeError, match='do not match exactly'):
        load_state_dict(model, state, strict=True)
    load_state_dict(model, state)
    assert torch.equal(model.backbone.conv1.weight, state['backbone.conv1.weight'])


def test_a_form_that_is_named_but_fits_loads(tmp_path):
    """Where there was no BN to fold, the folded form is the plain one."""
    state = weights('OREPARepVGG', 'plain')
    torch.save({'state_dict': state, 'meta': {'form': 'folded'}}, tmp_path / 'model.pth')
    for load in (lambda model, path: load_checkpoint(model, str(path)), load_weights):
        model = detector('OREPARepVGG', 'plain')
        load(model, tmp_path / 'model.pth')
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def unrelated():
    """A small stock network; and one with one more convolution and BN."""
    def conv(bias):
        return torch.nn.Conv2d(3, 3, 3, padding=1, bias=bias)
    old = torch.nn.Sequential(conv(True), torch.nn.ReLU(), conv(True))
    new = torch.nn.Sequential(conv(False), torch.nn.BatchNorm2d(3), conv(True),
                              torch.nn.Sequential(conv(False), torch.nn.BatchNorm2d(3)))
    return old, new


@pytest.mark.parametrize('with_metadata', [True, False])
def test_nothing_changes_without_our_layers(with_metadata, tmp_path):
    """Fine-tuning with a BN where there was none; stock MMEngine is the oracle."""
    stock = load_state_dict.__wrapped__
    for source, target in (unrelated(), unrelated()[::-1]):
        state = source.state_dict()
        torch.save({'state_dict': state if with_metadata else dict(state)}, tmp_path / 'model.pth')
        expected = copy.deepcopy(target)
        stock(expected, state, strict=False)
        load_checkpoint(target, str(tmp_path / 'model.pth'), strict=False)
        assert all(torch.equal(value, expected.state_dict()[key])
                   for key, value in target.state_dict().items())
        assert torch.equal(target[0].weight, source[0].weight)
        with pytest.raises(RuntimeError, match='do not match exactly'):
            load_state_dict(target, state, strict=True)


def a_part(state, layer, keep):
    return {key: value for key, value in state.items()
            if not key.startswith(f'{layer}.') or keep(key)}


@pytest.mark.parametrize(('backbone', 'layer', 'lost'), [
    ('OREPAResNet', 'backbone.layer1.0.conv1', 'weight_orepa_gconv_dw'),
    ('OREPAResNet', 'backbone.layer2.1.conv2', 'vector'),
    ('OREPAResNet', 'backbone.conv1', 'weight1.weight_orepa_origin'),
    ('DBBResNet', 'backbone.layer1.0.conv1', 'dbb_1x1_kxk.bn2.running_var'),
    ('OREPARepVGG', 'backbone.stage_1.0.branch_3x3.conv', 'weight_rbr_avg_conv'),
])
def test_a_part_of_a_layer_is_refused_at_every_door(backbone, layer, lost, tmp_path):
    model = detector(backbone, 'training')
    state = weights(backbone, 'training')
    key = f'{layer}.{lost}'
    spoilt = {'missing': {k: v for k, v in state.items() if k != key},
              'misshapen': {**state, key: state[key][:-1]},
              'alone': a_part(state, layer, lambda k: k == key)}
    before = snapshot(model)
    for name, part in spoilt.items():
        torch.save({'state_dict': part}, tmp_path / f'{name}.pth')
        path = str(tmp_path / f'{name}.pth')
        for load in (lambda path=path: load_checkpoint(model, path),
                     lambda path=path: load_checkpoint(model, path, strict=True),
                     lambda path=path: load_weights(model, path),
                     lambda part=part: mmengine.runner.load_state_dict(model, part)):
            with pytest.raises(CheckpointError, match=f'only a part of {layer},') as error:
                load()
            assert (f'{key}' in str(error.value)) == (name != 'alone')
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())


def test_load_from_of_a_runner(tmp_path):
    state = weights('OREPAResNet', 'training')
    del state['backbone.layer1.0.conv1.weight_orepa_1x1']
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'part.pth')
    runner = Runner(detector('OREPAResNet', 'training'), str(tmp_path / 'work'),
                    load_from=str(tmp_path / 'part.pth'), default_scope='mmdet')
    with pytest.raises(CheckpointError, match=r'layer1\.0\.conv1\.weight_orepa_1x1'):
        runner.load_or_resume()


def test_older_files_and_files_without_counters_load():
    state = weights('DBBResNet', 'training')
    require_same_form(detector('DBBResNet', 'training'),
                      {k: v for k, v in state.items() if 'num_batches_tracked' not in k})
    state = weights('OREPAResNet', 'training')
    constants = {key: value for key, value in detector('OREPAResNet', 'training').named_buffers()
                 if key not in state}
    assert constants
    model = detector('OREPAResNet', 'training')
    load_state_dict(model, {**state, **constants}, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('prefix', ['backbone.', None])
def test_init_cfg_of_a_stock_backbone(prefix, tmp_path):
    """The stock class, through MMEngine's own `Pretrained`."""
    state = weights('OREPAResNet', 'training')
    if prefix is None:
        state = {key.removeprefix('backbone.'): value for key, value in state.items()}
    torch.save({'state_dict': state}, tmp_path / 'training.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'training.pth'))
    model = detector('OREPAResNet', 'plain',
                     init_cfg={**init_cfg, **({'prefix': prefix} if prefix else {})})
    with pytest.raises(CheckpointError, match='training form, but the model is in plain form'):
        model.init_weights()


def test_deploy_true_is_the_plain_form():
    model = detector('OREPAResNet', 'training', deploy=True)
    load_state_dict(model, weights('OREPAResNet', 'plain'), strict=True)
    with pytest.raises(CheckpointError, match='training form, but the model is in plain form'):
        load_state_dict(model, weights('OREPAResNet', 'training'))


def test_wrapped_models_and_prefixed_checkpoints():
    from torch.nn.parallel import DataParallel
    model = DataParallel(detector('OREPAResNet', 'plain'))
    state = {f'module.{key}': value for key, value in weights('OREPAResNet', 'training').items()}
    with pytest.raises(CheckpointError, match='training form, but the model is in plain form'):
        _load_checkpoint_to_model(model, {'state_dict': state})


@needs_golden
def test_names_of_the_authors():
    state = golden('net_resnet18_narrow')['state_dict']
    for form in ('training', 'plain'):
        with pytest.raises(CheckpointError, match=r'authors.*\n.*convert_checkpoint'):
            load_state_dict(detector('OREPAResNet', form), state)


def test_what_is_no_mismatch_loads():
    """Other parts may be missing or left over, as MMEngine allows."""
    training = weights('OREPAResNet', 'training')
    model = detector('OREPAResNet', 'training')
    require_same_form(model, {k: v for k, v in training.items() if k.startswith('neck')})
    require_same_form(model, {k: v for k, v in training.items() if 'layer4' not in k})
    require_same_form(model, {**training, 'mask_head.conv.weight': torch.zeros(1),
                              'other.conv.vector': torch.zeros(1)})
    require_same_form(model.neck, training)  # no place in common
    require_same_form(model, {})
    plain = weights('OREPAResNet', 'plain')
    require_same_form(detector('OREPAResNet', 'plain'),
                      {k: v for k, v in plain.items() if 'running' not in k})
    # fine-tuning with a BN where there was a bias
    normed = MODELS.build(dict(
        type='RetinaNet', backbone=dict(type='ResNet', **BACKBONES['OREPAResNet']),
        neck={**NECK, 'norm_cfg': dict(type='BN')}, bbox_head=HEAD))
    require_same_form(normed, plain)
    stock = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.GroupNorm(2, 4))
    require_same_form(stock, {'0.weight': torch.zeros(4, 3, 3, 3), '0.bias': torch.zeros(4)})


@pytest.mark.parametrize('name', ['attn', 'attn.sub'])
def test_a_parameter_of_others_that_is_called_vector(name, tmp_path):
    """Scaling vectors are no proof of a training form by themselves."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Conv2d(3, 3, 1)

    torch.save({f'{name}.vector': torch.zeros(3)}, tmp_path / 'x.pth')
    load_checkpoint(Net(), str(tmp_path / 'x.pth'))  # MMEngine's warning
