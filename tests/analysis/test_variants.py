"""The variants of a config: other blocks, everything else as it is."""

import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import orepa_mm  # noqa: F401
from orepa_mm.analysis.variants import Variant, variant_config, with_block_options
from orepa_mm.errors import ConfigError
from orepa_mm.layers import DBBConv2d, reparam_layers

LIGHT = 'faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py'
PRETRAINED = 'faster_rcnn/faster-rcnn_orepa-r50_fpn_1x_coco.py'


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def config(name, **options):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    return cfg


def made(name, text, plain_checkpoint=None, **options):
    return variant_config(config(name, **options), Variant.parse(text), plain_checkpoint)


def without_model(cfg):
    return {key: value for key, value in cfg.to_dict().items() if key != 'model'}


@pytest.mark.parametrize('text', ['plain', 'dbb', 'orepa', 'orepa:single_init'])
def test_everything_but_the_model_stays(text):
    cfg = config(LIGHT)
    before = cfg.to_dict()
    assert without_model(variant_config(cfg, Variant.parse(text))) == without_model(cfg)
    assert cfg.to_dict() == before


def test_plain_is_the_stock_network():
    model = made(LIGHT, 'plain').model
    assert model.backbone.type == 'ResNet'
    stock = MODELS.build(dict(type='ResNet', depth=18, base_channels=32))
    built = MODELS.build(model.backbone)
    assert type(built) is type(stock)
    assert ({key: value.shape for key, value in built.state_dict().items()}
            == {key: value.shape for key, value in stock.state_dict().items()})


def test_plain_starts_from_the_same_weights():
    cfg = config(PRETRAINED)
    assert made(PRETRAINED, 'plain').model.backbone.init_cfg == cfg.model.backbone.init_cfg
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('torchvision://')


def test_plain_repvgg_is_trained_with_its_branches():
    backbone = made('faster_rcnn/faster-rcnn_orepa-repvgg-a1_fpn_1x_coco.py', 'plain',
                    **{'model.backbone.init_cfg': None}).model.backbone
    assert backbone.type == 'mmpretrain.RepVGG'
    assert not backbone.get('deploy')
    assert hasattr(MODELS.build(backbone).stage_1[1], 'branch_1x1')


def test_a_stock_model_that_is_expanded():
    plain = made('rtmdet/rtmdet_orepa-tiny_8xb32-300e_coco.py', 'plain').model
    assert plain.type == 'RTMDet'
    assert 'expand' not in plain
    assert 'model_type' not in plain
    options = made('rtmdet/rtmdet_orepa-tiny_8xb32-300e_coco.py', 'orepa:single_init').model.expand
    assert options.conv_cfg == dict(type='OREPA', single_init=True)
    with pytest.raises(ConfigError, match='Expanded'):
        made('rtmdet/rtmdet_orepa-tiny_8xb32-300e_coco.py', 'dbb')


def test_dbb():
    backbone = MODELS.build(made(LIGHT, 'dbb').model.backbone)
    layers = list(reparam_layers(backbone))
    assert layers
    assert all(type(layer) is DBBConv2d for layer in layers)
    with pytest.raises(ConfigError, match='OREPAResNeXt has no counterpart'):
        made('faster_rcnn/faster-rcnn_orepa-x50-32x4d_fpn_1x_coco.py', 'dbb')


def test_options_reach_every_block():
    single = MODELS.build(made(LIGHT, 'orepa:single_init').model.backbone)
    for layer in reparam_layers(single):
        for generator in getattr(layer, 'generators', [layer]):
            assert torch.equal(generator.vector.sum(0), torch.ones_like(generator.vector[0]))


def test_options_of_a_part_and_of_a_backbone():
    model = Config(dict(model=dict(
        backbone=dict(type='mmdet.OREPAResNet', depth=50),
        neck=dict(type='FPN', conv_cfg=dict(type='OREPA', single_init=True)),
        heads=[dict(type='RPNHead', conv_cfg=None)]))).model
    compiled = with_block_options(model, dict(compile=True))
    assert compiled['backbone']['conv_cfg'] == dict(compile=True)
    assert compiled['neck']['conv_cfg'] == dict(type='OREPA', single_init=True, compile=True)
    assert compiled['heads'] == [dict(type='RPNHead', conv_cfg=None)]
    assert 'conv_cfg' not in model.backbone


def test_settings_of_the_config():
    variant = Variant.parse('orepa:lr=5e-4,model.backbone.out_indices=(0,1),init_hyper_para=0.5')
    assert variant.settings == {'optim_wrapper.optimizer.lr': 5e-4,
                                'model.backbone.out_indices': (0, 1)}
    assert variant.block_options == dict(init_hyper_para=0.5)
    cfg = variant_config(config(LIGHT), variant)
    assert cfg.optim_wrapper.optimizer.lr == 5e-4
    assert cfg.model.backbone.out_indices == (0, 1)
    assert cfg.model.backbone.conv_cfg == dict(init_hyper_para=0.5)


def test_folders_differ():
    texts = ['orepa', 'orepa:lr=1e-3', 'orepa:lr=1e-4', 'orepa:single_init', 'plain:lr=1e-3']
    assert len({Variant.parse(text).slug for text in texts}) == len(texts)
    assert '/' not in Variant.parse('orepa:load_from=/data/x.pth').slug


@pytest.mark.parametrize(('text', 'message'), [
    ('stock', "no variant 'stock', choose among plain, dbb, orepa, expand"),
    ('plain:single_init', 'no OREPA blocks that could take single_init'),
    ('dbb:compile', 'no OREPA blocks'),
])
def test_what_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=message):
        Variant.parse(text)


def test_a_config_without_orepa():
    cfg = config(LIGHT)
    cfg.model = made(LIGHT, 'plain').model
    with pytest.raises(ConfigError, match='nothing of OREPA'):
        variant_config(cfg, Variant.parse('plain'))


def test_a_plain_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match='--plain-checkpoint'):
        made(LIGHT, 'expand')
    file = tmp_path / 'plain.pth'
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.ones(1),
                                'head.fc.weight': torch.ones(1)}), file)
    pretrained = dict(type='Pretrained', checkpoint=str(file), prefix='backbone.')
    for text in ('plain', 'expand'):
        cfg = made(LIGHT, text, file)
        assert cfg.model.backbone.init_cfg == pretrained
        assert cfg.get('load_from') is None
    assert made(LIGHT, 'orepa', file).model.backbone.init_cfg is None
    torch.save({'conv1.weight': torch.ones(1)}, file)
    assert made(LIGHT, 'plain', file).model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=str(file))
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.ones(1),
                                'neck.conv.weight': torch.ones(1)}), file)
    cfg = made(LIGHT, 'plain', file)
    assert cfg.load_from == str(file)
    assert cfg.model.backbone.init_cfg is None
