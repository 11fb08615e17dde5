"""The stock config and the stock checkpoint of a model with OREPA layers."""

import copy

import pytest
import torch
from helpers import randomize, relative_error, run
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope

from orepa_mm.checkpoints import load_weights
from orepa_mm.export import deploy_config, save_deployed
from orepa_mm.export.stock import portable_text
from orepa_mm.reparam import reparameterize

MODEL = dict(
    type='RetinaNet',
    backbone=dict(type='ResNet', depth=18, base_channels=8, conv_cfg=dict(type='OREPA')),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5,
              conv_cfg=dict(type='OREPA')),
    bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,
                   stacked_convs=1, conv_cfg=dict(type='OREPA', single_init=True)))


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


def test_stock_modules_with_the_conv_layer_type(tmp_path):
    """Nothing adapted: backbone, FPN and head are mmdet's own."""
    cfg = Config(dict(model=copy.deepcopy(MODEL), load_from='x', work_dir='y', custom_imports=dict(
        imports=['orepa_mm', 'json'], allow_failed_imports=False)))
    stock = deploy_config(cfg)
    assert cfg.model.neck.conv_cfg.type == 'OREPA'  # the given config is left alone
    assert 'OREPA' not in stock.pretty_text
    assert stock.custom_imports.imports == ['json']
    assert 'load_from' not in stock
    assert 'work_dir' not in stock

    model = randomize(MODELS.build(cfg.model)).eval()
    with pytest.raises(ValueError, match='training form'):
        save_deployed(model, stock, tmp_path, {})
    assert not list(tmp_path.iterdir())
    paths = save_deployed(reparameterize(model), stock, tmp_path, {'form': 'deployed'})
    loaded = MODELS.build(Config.fromfile(paths[1]).model)
    assert load_weights(loaded, paths[0])['meta'] == {'form': 'deployed',
                                                      'cfg': stock.pretty_text}
    loaded.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(loaded.bbox_head(loaded.extract_feat(x)),
                              model.bbox_head(model.extract_feat(x))):
            for level, expected in zip(one, other):
                assert relative_error(level, expected) < 1e-4


def test_what_no_stock_config_can_name_is_an_error():
    model = copy.deepcopy(MODEL)
    model['bbox_head']['some_layer'] = dict(type='OREPA')
    with pytest.raises(ValueError, match='no stock counterpart'):
        deploy_config(Config(dict(model=model)))


OTHERS = {
    'repvgg': dict(
        type='OREPARepVGG', out_indices=(0, 1, 2, 3), arch=dict(
            num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4, group_layer_map=None,
            se_cfg=None)),
    'dbb': dict(type='DBBResNet', depth=18, base_channels=8),
}
STOCK = '''
import sys
sys.modules['orepa_mm'] = None
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.registry import MODELS, init_default_scope
init_default_scope('mmdet')
folder = sys.argv[1]
model = MODELS.build(Config.fromfile(f'{folder}/config.py').model)
model.load_state_dict(torch.load(f'{folder}/model.pth')['state_dict'], strict=True)
model.eval()
torch.save(model.extract_feat(torch.load(f'{folder}/x.pth')), f'{folder}/features.pth')
'''


@pytest.mark.parametrize('name', OTHERS)
def test_exported_where_orepa_mm_cannot_be_imported(name, tmp_path):
    """RepVGG is mmpretrain's, found by its scope; a DBB ResNet is a ResNet."""
    cfg = copy.deepcopy(MODEL)
    cfg['backbone'] = OTHERS[name]
    for part in ('neck', 'bbox_head'):
        cfg[part].pop('conv_cfg')
    cfg = Config(dict(model=cfg, optim_wrapper=dict(
        constructor='OREPAOptimWrapperConstructor', paramwise_cfg=dict(stem_lr_mult=0.1)),
        reparam=dict(backbone=dict(type='DBBResNet'))))
    stock = deploy_config(cfg)
    assert stock.optim_wrapper == dict(paramwise_cfg={})
    assert 'reparam' not in stock
    model = randomize(MODELS.build(cfg.model)).eval()
    save_deployed(reparameterize(model), stock, tmp_path, {})
    x = torch.randn(1, 3, 64, 64)
    torch.save(x, tmp_path / 'x.pth')
    run('-c', STOCK, tmp_path)
    with torch.no_grad():
        for one, other in zip(torch.load(tmp_path / 'features.pth'), model.extract_feat(x)):
            assert relative_error(one, other) < 1e-4


def with_backbone(backbone, channels):
    model = copy.deepcopy(MODEL)
    model['backbone'] = backbone
    model['neck'].update(in_channels=[channels], num_outs=1)
    return Config(dict(model=model))


def built_from_files(cfg, stock, folder):
    """The training form, and what the written files of its deployed form build."""
    model = randomize(MODELS.build(cfg.model))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.fill_(10)  # so that the signal of random weights stays small
    model.eval()
    paths = save_deployed(reparameterize(model), stock, folder, {})
    loaded = MODELS.build(Config.fromfile(paths[1]).model).eval()
    load_weights(loaded, paths[0])
    return model, loaded


def test_where_the_stock_module_has_another_conv_layer_by_default(tmp_path):
    """Left out, `conv_cfg` would be one that pads otherwise; the weights would load."""
    cfg = with_backbone(dict(type='mmpretrain.EfficientNet', arch='b0',
                             conv_cfg=dict(type='OREPA')), 1280)
    stock = deploy_config(cfg)
    assert stock.model.backbone['conv_cfg'] is None
    model, loaded = (network.double() for network in built_from_files(cfg, stock, tmp_path))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(loaded.extract_feat(x)[0], model.extract_feat(x)[0]) < 1e-4


FOREIGN = {
    'beside ours': dict(type='mmpretrain.RepVGG', out_indices=(3,), arch=dict(
        num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None)),
    'with our layers': dict(type='mmpretrain.MobileOne', conv_cfg=dict(type='OREPA'), arch=dict(
        num_blocks=[1, 1, 1, 1], width_factor=[0.125] * 4, num_conv_branches=[1] * 4,
        num_se_blocks=[0] * 4)),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_blocks_that_re_parameterize_themselves_are_built_deployed(name, tmp_path):
    """`reparameterize` calls their `switch_to_deploy`; the config must build what that leaves."""
    cfg = with_backbone(FOREIGN[name], 64)
    stock = deploy_config(cfg)
    assert stock.model.backbone.deploy is True
    assert 'deploy' not in stock.model.neck
    assert 'deploy' not in cfg.model.backbone
    model, loaded = (network.double() for network in built_from_files(cfg, stock, tmp_path))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(loaded.extract_feat(x)[0], model.extract_feat(x)[0]) < 1e-4


EXPANDED = dict(model_type='RetinaNet', expand=dict(conv_cfg=dict(type='OREPA'),
                                                    exclude=['*.retina_cls']))


@pytest.mark.parametrize('form', ['plain', 'folded'])
def test_an_expanded_model_is_the_stock_config_again(form, tmp_path):
    """`type` becomes what it was; folded, `BNFolded` stands over it as over any other."""
    stock = copy.deepcopy(MODEL)
    for part in ('backbone', 'neck', 'bbox_head'):
        stock[part].pop('conv_cfg')
    cfg = Config(dict(model={**stock, 'type': 'Expanded', **EXPANDED},
                      custom_imports=dict(imports=['orepa_mm'], allow_failed_imports=False)))
    deployed = deploy_config(cfg, form)
    if form == 'plain':
        assert deployed.to_dict() == dict(model=stock)
    else:
        assert deployed.model == {**stock, 'type': 'BNFolded', 'model_type': 'RetinaNet'}
        assert deployed.custom_imports.imports == ['orepa_mm']
    model = randomize(MODELS.build(cfg.model)).eval()
    paths = save_deployed(reparameterize(model, fold_bn=form == 'folded'), deployed, tmp_path, {})
    loaded = MODELS.build(Config.fromfile(paths[1]).model).eval()
    load_weights(loaded, paths[0])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(loaded.bbox_head(loaded.extract_feat(x)),
                              model.bbox_head(model.extract_feat(x))):
            for level, expected in zip(one, other):
                assert relative_error(level, expected) < 1e-4


def test_an_expanded_part_whose_stock_class_has_a_deploy_form():
    """Unwrapped first: the part below is treated as if it stood there itself."""
    part = dict(type='Expanded', model_type='mmpretrain.RepVGG', arch='A0', out_indices=(3,))
    assert deploy_config(with_backbone(part, 1280)).model.backbone == dict(
        type='mmpretrain.RepVGG', arch='A0', out_indices=(3,), deploy=True)


def test_no_pretrained_weights_under_their_older_name():
    """MMSegmentation's configs say `pretrained=` beside the backbone."""
    cfg = Config(dict(model=dict(copy.deepcopy(MODEL), pretrained='open-mmlab://resnet50_v1c')))
    assert deploy_config(cfg).model.pretrained is None


@pytest.mark.parametrize(('backbone', 'scope', 'expected'), [
    (dict(type='mmpretrain.OREPAResNet', depth=18), 'mmdet', 'mmpretrain.ResNet'),
    (dict(type='mmseg.OREPAResNetV1c', depth=18), 'mmdet', 'mmseg.ResNetV1c'),
    (dict(type='OREPAResNetV1c', _scope_='mmpretrain', depth=18), 'mmdet', 'mmpretrain.ResNetV1c'),
    (dict(type='mmdet.OREPAResNet', depth=18), 'mmdet', 'ResNet'),
    (dict(type='OREPAResNet', depth=18), 'mmseg', 'ResNet'),
    (dict(type='OREPARepVGG', arch='A0'), 'mmdet', 'mmpretrain.RepVGG')])
def test_the_stock_backbone_is_that_of_the_same_package(backbone, scope, expected):
    init_default_scope(scope)
    cfg = Config(dict(default_scope=scope, model=dict(type='Detector', backbone=backbone)))
    with DefaultScope.overwrite_default_scope(scope):
        found = deploy_config(cfg).model.backbone
    assert found.type == expected


def test_a_lazy_config_and_scoped_names_lose_everything_of_ours():
    """Classes are dumped as their whole paths; a scope may stand before any name."""
    cfg = Config(dict(
        model=dict(type='mmdet.models.detectors.RetinaNet', backbone=dict(
            type='orepa_mm.backbones.det.OREPAResNet', depth=18, init_cfg=[
                dict(type='Pretrained', checkpoint='x'), dict(type='Xavier', layer='Linear')])),
        default_hooks=dict(checkpoint=dict(type='orepa_mm.engine.WholeCheckpointHook', interval=1),
                           other=dict(type='mmdet.WholeCheckpointHook')),
        custom_hooks=[dict(type='mmdet.ReparamTestHook'), dict(type='mmengine.EMAHook')],
        optim_wrapper=dict(constructor='orepa_mm.engine.OREPAOptimWrapperConstructor',
                           paramwise_cfg=dict(stem_lr_mult=0.1, norm_decay_mult=0))))
    found = deploy_config(cfg)
    assert found.model.backbone.type in ('ResNet', 'mmdet.ResNet')
    assert found.model.backbone.init_cfg == [dict(type='Xavier', layer='Linear')] or (
        found.model.backbone.init_cfg is None)
    assert found.default_hooks == dict(checkpoint=dict(type='CheckpointHook', interval=1),
                                       other=dict(type='CheckpointHook'))
    assert found.custom_hooks == [dict(type='mmengine.EMAHook')]
    assert found.optim_wrapper == dict(paramwise_cfg=dict(norm_decay_mult=0))
    assert 'orepa' not in found.pretty_text.lower()


@pytest.mark.parametrize('root', ['/data/my shapes', "it's/here/", 'data'])
@pytest.mark.parametrize('at_top', [True, False])
def test_one_line_moves_a_deployed_config_to_other_data(tmp_path, root, at_top):
    """Every path below the folder follows its first line, and no other."""
    dataset = dict(type='CocoDataset', data_root=root, ann_file='annotations/val.json')
    below, beside = root.rstrip('/') + '/annotations/val.json', root.rstrip('/') + '-2/val.json'
    cfg = Config(dict(
        model=dict(type='X'), test_dataloader=dict(dataset=dict(dataset=dataset)),
        test_evaluator=[dict(ann_file=below), dict(ann_file=beside)],
        **(dict(data_root=root) if at_top else {})))
    text = portable_text(cfg)
    (tmp_path / 'config.py').write_text(text)
    assert Config.fromfile(tmp_path / 'config.py').to_dict() == {
        **cfg.to_dict(), 'data_root': root}
    first, rest = text.split('\n', 1)
    assert first.startswith(f'data_root = {root!r}')
    end = '/' if root.endswith('/') else ''
    (tmp_path / 'moved.py').write_text(f'data_root = "/new{end}"\n{rest}')
    moved = Config.fromfile(tmp_path / 'moved.py')
    assert moved.test_dataloader.dataset.dataset.data_root == f'/new{end}'
    assert [metric.ann_file for metric in moved.test_evaluator] == [
        '/new/annotations/val.json', beside]


def test_configs_without_one_folder_stay_as_they_are():
    for content in (dict(model=dict(type='X')),
                    dict(data_root='x', model=dict(type='X')),
                    {f'{split}_dataloader': dict(dataset=dict(data_root=split))
                     for split in ('train', 'val')}):
        assert portable_text(Config(content)) == Config(content).pretty_text
