"""Every config of the project, by being there."""

import re

import pytest
import torch
import torchvision
import yaml
from batches import tiny_batch
from helpers import ROOT, on_meta_device, randomize, relative_error, vary_scales
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import create_feature_extractor

from orepa_mm.export import deploy_config
from orepa_mm.layers import reparam_layers
from orepa_mm.reparam import is_training_form, reparameterize
from orepa_mm.reparam.raw_outputs import run

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py')
                 if path.parent.name != '_base_')
#: From the authors' weights: each is the config of its sibling but for these.
FROM_THE_AUTHORS = {path: path.with_name(path.name.replace('-in1k_', '_')) for path in CONFIGS
                    if '-in1k_' in path.name}
NETWORKS = [path for path in CONFIGS if path not in FROM_THE_AUTHORS]
#: Too large to train here; their lighter siblings are made of the same lines.
HEAVY = ('r101', 'resnet101', 'repvgg-B1', 'resnet18-1.5x', 'resnet18-2x')
TRAINED = [path for path in NETWORKS if not any(name in path.stem for name in HEAVY)]


def load(path):
    cfg = Config.fromfile(path)
    cfg.model.pop('pretrained', None)
    init_default_scope(cfg.default_scope)
    return cfg


def test_names_are_unique_for_mim():
    names = [path.name for path in (ROOT / 'configs').rglob('*.py')]
    assert len(names) == len(set(names))
    assert CONFIGS


def test_metafiles_list_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [model for file in index['Import']
              for model in yaml.safe_load((ROOT / file).read_text())['Models']]
    assert sorted(model['Config'] for model in models) == [
        str(path.relative_to(ROOT)) for path in CONFIGS]
    assert all(ROOT.joinpath(model['Config']).stem == model['Name'] for model in models)
    assert not any('Weights' in model for model in models)  # there are none to link to


def test_readme_links_every_config_and_no_dead_ones():
    for page in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')):
        links = set(re.findall(r'\]\(([^)#:]+)[^):]*\)', page.read_text()))
        assert all((page.parent / link).exists() for link in links), page
        if page.name == 'README.md':
            assert {str(path.relative_to(ROOT)) for path in CONFIGS} <= links


@pytest.mark.parametrize('path', FROM_THE_AUTHORS, ids=lambda path: path.stem)
def test_the_authors_weights_are_all_that_differs(path):
    ours, sibling = (Config.fromfile(found).to_dict() for found in (path, FROM_THE_AUTHORS[path]))
    start = ours['model']['backbone'].pop('init_cfg')
    assert start['type'] == 'Pretrained'
    assert start != sibling['model']['backbone'].pop('init_cfg')
    assert ours == sibling


@pytest.mark.parametrize('path', NETWORKS, ids=lambda path: path.stem)
def test_builds_and_deploys_to_a_stock_model(path):
    cfg = load(path)
    stock = deploy_config(cfg)
    assert 'orepa' not in stock.pretty_text.lower()
    assert 'dbb' not in stock.pretty_text.lower()
    with on_meta_device():
        model = MODELS.build(cfg.model)
        deployed = MODELS.build(stock.model)
    assert is_training_form(model)
    with torch.no_grad(), on_meta_device():
        converted = reparameterize(model)
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in deployed.state_dict().items()}


#: Options that are numbers of channels.
WIDTHS = ('base_channels', 'stem_channels', 'in_channels', 'out_channels', 'channels',
          'feat_channels', 'fc_out_channels', 'conv_out_channels', 'c1_in_channels', 'c1_channels',
          'last_in_channels')


def narrow(cfg):
    """An eighth of all channels but those of the image, in place.

    The full width is built without memory above.
    """
    for key, value in cfg.items():
        if key in WIDTHS:
            cfg[key] = ([n // 8 for n in value] if isinstance(value, (list, tuple))
                        else value // 8 or value)
        elif key == 'widen_factor':
            cfg[key] = value / 8
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                narrow(part)


@pytest.mark.parametrize('path', TRAINED, ids=lambda path: path.stem)
def test_trains_and_deploys_to_the_same_function(path):
    """One step on a tiny batch, then both forms on real values everywhere."""
    cfg = load(path)
    if cfg.model.type == 'Expanded':
        narrow(cfg.model)
    elif 'light' not in path.stem:
        cfg.model.backbone.setdefault('base_channels', 64)
        if 'arch' not in cfg.model.backbone:  # a RepVGG's stem follows
            cfg.model.backbone.setdefault('stem_channels', 64)
        if 'groups' in cfg.model.backbone:
            cfg.model.backbone.groups = 4
        narrow(cfg.model)
    cfg.model.backbone.pop('init_cfg', None)
    if 'frozen_stages' in cfg.model.backbone:
        cfg.model.backbone.frozen_stages = -1
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    model = MODELS.build(cfg.model)
    model.init_weights()
    data = tiny_batch(cfg.default_scope)
    if cfg.default_scope == 'mmdet' and not model.with_mask:  # else RTMDet would read them
        for sample in data['data_samples']:
            del sample.gt_instances.masks
    vary_scales(model)
    calibrate(model, data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    model.train()
    losses = model.train_step(data, optim_wrapper)
    assert all(value.isfinite().all() for value in losses.values())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    layers = set(reparam_layers(model))
    for name, layer in model.named_modules():
        if layer in layers:
            assert any(key.startswith(f'{name}.') for key in changed), f'{name} did not learn'

    calibrate(model, data)
    model.eval()
    with torch.no_grad():
        batch = model.data_preprocessor(data, False)
        model.double()  # exact: rounding grows in a network at random weights
        expected = run(model, batch)
        found = run(reparameterize(model, inplace=True), batch, expected).outputs
    assert expected.failure is None
    assert found.keys() == expected.outputs.keys()
    assert {'backbone', 'output'} <= {re.split(r'[.\[]', name)[0] for name in found}
    for name, tensor in expected.outputs.items():
        assert relative_error(found[name], tensor) < 1e-8, name


@torch.no_grad()
def calibrate(model, data):
    """Give every BN of the backbone the statistics of the batch: outputs stay in range."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model.extract_feat(model.data_preprocessor(data, False)['inputs'])
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


STOCK = {
    'faster-rcnn_orepa-r50_fpn_1x_coco': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'faster-rcnn_orepa-r50-in1k_fpn_1x_coco': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask-rcnn_orepa-r50_fpn_1x_coco': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'retinanet_dbb-r50_fpn_1x_coco': 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'pspnet_orepa-r50-d8_4xb2-40k_cityscapes-512x1024':
        'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    'deeplabv3plus_orepa-r18-d8_4xb2-80k_cityscapes-512x1024':
        'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    'upernet_orepa-r50_4xb2-40k_cityscapes-512x1024':
        'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py',
}


@pytest.mark.parametrize('name', STOCK)
def test_differs_from_the_stock_config_in_backbone_and_optimizer_options_only(name):
    ours = Config.fromfile(next(path for path in CONFIGS if path.stem == name)).to_dict()
    theirs = get_config(STOCK[name]).to_dict()
    assert ours.pop('custom_imports')['imports'] == ['orepa_mm']
    ours.pop('reparam')
    ours['optim_wrapper'].pop('constructor')
    paramwise = ours['optim_wrapper'].pop('paramwise_cfg')
    assert paramwise.keys() == {'stem_lr_mult', 'norm_decay_mult', 'bias_decay_mult'}
    stock = theirs['model'].pop('backbone')
    backbone = ours['model'].pop('backbone')
    assert backbone.pop('type') in ('OREPAResNet', 'DBBResNet')
    init_cfg, stock_init_cfg = backbone.pop('init_cfg'), stock.pop('init_cfg', None)
    if 'dbb' in name or 'in1k' in name:
        assert init_cfg['checkpoint'].startswith('checkpoints/')
    elif stock_init_cfg is not None:  # segmentors: of a network with another stem
        assert init_cfg == {k: v for k, v in stock_init_cfg.items() if k != '_scope_'}
    stock.pop('type')
    for model in (ours['model'], theirs['model']):
        model.pop('pretrained', None)
    assert _without_scope(backbone) == _without_scope(stock)
    assert _without_scope(ours) == _without_scope(theirs)


@pytest.mark.parametrize(('name', 'base'), [
    ('rtmdet_orepa-tiny_8xb32-300e_coco', 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
    ('orepa-stdc1_4xb12-80k_cityscapes-512x1024',
     'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py'),
])
def test_expanded_configs_differ_from_the_stock_config_in_the_wrapper_only(name, base):
    ours = load(next(path for path in CONFIGS if path.stem == name))
    theirs = get_config(base)
    theirs.model.pop('pretrained', None)
    deployed = _without_scope(deploy_config(ours).to_dict())
    assert deployed == _without_scope(deploy_config(theirs).to_dict())
    assert ours.custom_imports.imports == ['orepa_mm']
    assert ours.model.pop('expand')['conv_cfg'] == dict(type='OREPA')
    ours.model.type = ours.model.pop('model_type')
    for key in ('custom_imports', 'reparam'):
        ours.pop(key)
    ours.optim_wrapper.pop('constructor', None)  # which changes nothing but the number of groups
    assert _without_scope(ours.to_dict()) == _without_scope(theirs.to_dict())


PLAIN_STARTS = [path for path in CONFIGS if re.search(
    r'_orepa-(r18|r50|r101|x50-32x4d)(-d8)?_', path.name) and 'light' not in path.name]


def test_every_config_that_can_starts_from_plain_weights():
    """And has a child that starts from the authors', which differs in nothing else."""
    assert len(PLAIN_STARTS) == 16
    for path in PLAIN_STARTS:
        child = path.with_name(re.sub(r'(_orepa-[^_]*)', r'\1-in1k', path.name))
        authors, plain = Config.fromfile(child), Config.fromfile(path)
        start = authors.model.backbone.pop('init_cfg')
        assert start.prefix == 'backbone.'
        assert re.fullmatch(r'checkpoints/orepa-res\S+_in1k\.pth', start.checkpoint)
        assert str(plain.model.backbone.depth) in start.checkpoint
        assert plain.model.backbone.pop('init_cfg').checkpoint.startswith('torchvision://')
        assert authors.to_dict() == plain.to_dict()


@pytest.mark.parametrize('path', PLAIN_STARTS, ids=lambda path: path.stem)
def test_the_plain_weights_fit_the_backbone(path):
    """By names and shapes; torchvision itself says what lies at its address."""
    cfg = load(path)
    name = cfg.model.backbone.init_cfg.checkpoint.removeprefix('torchvision://')
    with on_meta_device():
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
        backbone = MODELS.build(deploy_config(cfg).model.backbone)
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {
        k: v.shape for k, v in theirs.items() if not k.startswith('fc.')}


def test_a_plain_start_is_the_plain_network(tmp_path, monkeypatch):
    """From torchvision's address, as it lies in the cache after a download."""
    cfg = load(next(path for path in PLAIN_STARTS if path.name.startswith('faster-rcnn_orepa-r18')))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    file = tmp_path / 'hub' / 'checkpoints' / url.rpartition('/')[2]
    file.parent.mkdir(parents=True)
    plain = randomize(torchvision.models.resnet18())
    torch.save(plain.state_dict(), file)
    backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    assert is_training_form(backbone)
    features = create_feature_extractor(plain.double().eval(), [f'layer{i}' for i in range(1, 5)])
    backbone.double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(backbone(x), features(x).values(), strict=True):
            assert relative_error(found, expected) < 1e-4


def test_every_backbone_learns_at_the_authors_recipe():
    """ImageNet: 120 epochs, BN and biases without decay, biases twice as fast."""
    for path in CONFIGS:
        if path.parent.name == 'imagenet' and 'in1k' in path.stem and 'light' not in path.stem:
            cfg = load(path)
            assert cfg.train_cfg.max_epochs == 120
            with on_meta_device():
                backbone = MODELS.build(cfg.model.backbone)
            groups = build_optim_wrapper(backbone, cfg.optim_wrapper).optimizer.param_groups
            names = {id(p): name for name, p in backbone.named_parameters()}
            rates = {names[id(p)]: (group['lr'], group['weight_decay'])
                     for group in groups for p in group['params'] if id(p) in names}
            assert rates.keys() == set(names.values())
            found = {'bias': set(), 'norm': set(), 'other': set()}
            norms = {f'{name}.weight' for name, m in backbone.named_modules()
                     if isinstance(m, _BatchNorm)}
            for name, rate in rates.items():
                found['bias' if name.endswith('bias') else 'norm' if name in norms
                      else 'other'].add(rate)
            assert found == {'bias': {(0.2, 0)}, 'norm': {(0.1, 0)}, 'other': {(0.1, 1e-4)}}


def _without_scope(value):
    """MMEngine notes the scope in what comes from another package's config."""
    if isinstance(value, dict):
        return {k: _without_scope(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [_without_scope(v) for v in value]
    return value
