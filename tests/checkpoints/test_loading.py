"""Strict loading: everything is checked before anything is written."""

import pytest
import torch
import torchvision
from helpers import randomize
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from orepa_mm.checkpoints import load_checkpoint, load_pretrained, load_weights
from orepa_mm.errors import CheckpointError


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


def backbone(**kwargs):
    return MODELS.build(dict(type='OREPAResNet', depth=18, base_channels=8) | kwargs)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def refused(model, load, message):
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load()
    assert same(model, before)


def test_loading_is_strict(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save(nn.Linear(2, 3).state_dict(), path)
    model = nn.Linear(2, 3)
    load_weights(model, path)
    assert torch.equal(model.weight, load_checkpoint(path)['weight'])
    for other, message in ((nn.Linear(2, 4), 'size mismatch'),
                           (nn.Linear(2, 3, bias=False), 'which has no bias'),
                           (nn.Sequential(nn.Linear(2, 3)), 'it has no 0.weight')):
        refused(other, lambda other=other: load_weights(other, path), message)


def test_loads_what_it_should(tmp_path):
    state = randomize(backbone()).state_dict()
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in state.items()}},
               tmp_path / 'model.pth')
    model = backbone()
    x = torch.randn(1, 3, 32, 32)
    model.eval()(x)  # keeps the generated kernels of other weights
    load_pretrained(model, str(tmp_path / 'model.pth'), 'backbone')
    assert same(model, state)
    expected = backbone()
    expected.load_state_dict(state)
    assert torch.equal(model(x)[-1], expected.eval()(x)[-1])
    torch.save(state, tmp_path / 'whole.pth')
    model = backbone()
    load_weights(model, tmp_path / 'whole.pth')
    assert same(model, state)


#: The last key of the model: all others would be written before it.
LAST = 'layer4.1.bn2.running_var'
DAMAGES = {
    'missing': (lambda s: s.pop(LAST), f'it has no {LAST}'),
    'unknown': (lambda s: s.update({'layer4.1.bn3.weight': torch.ones(64)}),
                r'has no layer4\.1\.bn3\.weight'),
    'shape': (lambda s: s.update({LAST: torch.ones(3)}), f'size mismatch for {LAST}'),
    'nan': (lambda s: s[LAST].fill_(float('nan')), f'{LAST} holds values that are not finite'),
    'one nan': (lambda s: s['conv1.weight0.vector'].view(-1)[3:4].fill_(float('nan')),
                r'conv1\.weight0\.vector holds values that are not finite'),
    'inf': (lambda s: s[LAST][:1].fill_(float('-inf')), f'{LAST} holds values that are not finite'),
    'branch': (lambda s: s.pop('layer1.0.conv1.weight_orepa_gconv_dw'),
               r'only a part of layer1\.0\.conv1.*layer1\.0\.conv1\.weight_orepa_gconv_dw'),
    'sparse': (lambda s: s.update({LAST: s[LAST].to_sparse()}), f'{LAST} is no ordinary tensor'),
    'meta': (lambda s: s.update({LAST: s[LAST].to('meta')}), f'{LAST} is no ordinary tensor'),
    **{str(dtype): (lambda s, dtype=dtype: s.update({LAST: s[LAST].to(dtype)}),
                    f'{LAST} is of type {dtype}, where OREPAResNet has torch.float32')
       for dtype in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64)},
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_refused_load_leaves_the_model_untouched(damage, tmp_path):
    spoil, message = DAMAGES[damage]
    model = backbone()
    state = {key: value.clone() for key, value in randomize(backbone(), 1).state_dict().items()}
    spoil(state)
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': state}, path)
    for load in (lambda: load_weights(model, path), lambda: load_pretrained(model, str(path))):
        refused(model, load, rf'model\.pth(.|\n)*{message}')


@pytest.mark.parametrize(('depth', 'kwargs'), [(34, {}), (50, {}), (34, dict(deploy=True))])
def test_weights_of_a_deeper_network_are_an_error(depth, kwargs, tmp_path):
    """Those of depth 34 hold everything that depth 18 needs, in the same shapes."""
    state = backbone(depth=depth, **kwargs).state_dict()
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in state.items()}},
               tmp_path / 'prefix.pth')
    torch.save(state, tmp_path / 'bare.pth')
    model = backbone(**kwargs)
    for name, prefix in (('bare', None), ('prefix', 'backbone.')):
        refused(model, lambda name=name, prefix=prefix: load_pretrained(
            model, str(tmp_path / f'{name}.pth'), prefix),
            rf'{name}\.pth' + (r'.* which has no layer1\.2\.' if depth == 34 else ''))


@pytest.mark.parametrize('head', ['fc.weight', 'linear.weight', 'head.fc.weight'])
def test_a_head_without_a_prefix_is_left_out(head, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('orepa_mm.checkpoints.loading.print_log',
                        lambda message, *_: said.append(message))
    state = randomize(backbone()).state_dict()
    # what is not used may hold what it likes
    torch.save({**state, head: torch.full((2, 64), float('nan'))}, tmp_path / 'model.pth')
    model = backbone()
    load_pretrained(model, str(tmp_path / 'model.pth'))
    assert same(model, state)
    assert [head in message for message in said] == [True]


def test_other_parts_and_fewer_stages(tmp_path):
    state = randomize(backbone()).state_dict()
    torch.save({**{f'backbone.{key}': value for key, value in state.items()},
                'neck.conv.weight': torch.ones(1), 'bbox_head.scale': torch.tensor(3)},
               tmp_path / 'detector.pth')
    model = backbone(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2))
    load_pretrained(model, str(tmp_path / 'detector.pth'), 'backbone.')
    assert same(model, {key: value for key, value in state.items() if 'layer4' not in key})
    refused(model, lambda: load_pretrained(model, str(tmp_path / 'detector.pth'), 'neck.'),
            'it has no conv1')
    refused(model, lambda: load_pretrained(model, str(tmp_path / 'detector.pth'), 'mask_head.'),
            r'no key that begins with mask_head\.')


def test_torchvisions_classifier_into_the_deployed_backbone(tmp_path):
    """Its file holds `fc.*`; older ones have no `num_batches_tracked`."""
    theirs = randomize(torchvision.models.resnet18(width_per_group=64)).state_dict()
    old = theirs.copy()  # as a converter leaves it, with the versions of the modules
    old._metadata = theirs._metadata
    for key in theirs:
        if 'num_batches' in key:
            del old[key]
    for name, state in (('new', theirs), ('old', old)):
        torch.save(state, tmp_path / f'{name}.pth')
        model = backbone(base_channels=64, deploy=True)
        load_pretrained(model, str(tmp_path / f'{name}.pth'))
        assert torch.equal(model.layer4[1].conv2.weight, theirs['layer4.1.conv2.weight'])


def test_older_files_that_hold_the_constants_load(tmp_path):
    model = randomize(backbone(), 1)
    state = dict(model.state_dict())
    constants = {key: value.clone() for key, value in model.named_buffers() if key not in state}
    assert any(key.endswith('weight_orepa_prior') for key in constants)
    torch.save({'state_dict': {**constants, **state}}, tmp_path / 'older.pth')
    for load in (load_weights, lambda model, path: load_pretrained(model, str(path))):
        fresh = backbone()
        load(fresh, tmp_path / 'older.pth')
        assert same(fresh, state)
        assert all(torch.equal(dict(fresh.named_buffers())[key], value)
                   for key, value in constants.items())


def test_shared_layers_and_buffers_load(tmp_path):
    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 3, 1)
            self.other = self.one
            self.register_buffer('scale', torch.ones(2))
            self.register_buffer('alias', self.scale)

    path = tmp_path / 'model.pth'
    source, target = randomize(Sharing()), Sharing()
    torch.save(source.state_dict(), path)
    load_weights(target, path)
    assert same(target, source.state_dict())
    assert target.one is target.other
    assert not target.one.weight.is_meta
