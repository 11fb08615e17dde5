"""The variants of a config: other blocks, everything else as it is."""

import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

import orepa_mm  # noqa: F401
from orepa_mm.analysis.variants import Variant, variant_config, with_block_options
from orepa_mm.errors import CheckpointError, ConfigError
from orepa_mm.export.stock import deploy_config
from orepa_mm.layers import DBBConv2d, reparam_layers

LIGHT = 'faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py'
CLASSIFIER = 'imagenet/orepa-resnet18-light_300i_in1k.py'
REPVGG = 'imagenet/orepa-repvgg-light_1500i_cifar10.py'
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
    plain = MODELS.build(made(LIGHT, 'plain').model.backbone).state_dict()
    of_classifier = {f'backbone.{key}': value for key, value in plain.items()}
    torch.save(dict(state_dict={**of_classifier, 'head.fc.weight': torch.ones(1)}), file)
    pretrained = dict(type='Pretrained', checkpoint=str(file), prefix='backbone.')
    for text in ('plain', 'expand'):
        cfg = made(LIGHT, text, file)
        assert cfg.model.backbone.init_cfg == pretrained
        assert cfg.get('load_from') is None
    assert made(LIGHT, 'orepa', file).model.backbone.init_cfg is None
    torch.save(dict(state_dict={**of_classifier, 'neck.conv.weight': torch.ones(1)}), file)
    cfg = made(LIGHT, 'plain', file)
    assert cfg.load_from == str(file)
    assert cfg.model.backbone.init_cfg is None
    torch.save(plain, file)
    for name, scope in ((LIGHT, 'mmdet'), (CLASSIFIER, 'mmpretrain')):  # not the whole model
        with DefaultScope.overwrite_default_scope(scope):
            cfg = made(name, 'plain', file)
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(file))
        assert cfg.get('load_from') is None


def test_a_checkpoint_that_is_not_plain_or_of_another_network(tmp_path):
    file = tmp_path / 'other.pth'
    for model, what in ((made(LIGHT, 'orepa'), 'is in training form'),
                        (made(LIGHT, 'plain:model.backbone.base_channels=16'), 'does not fit')):
        torch.save(MODELS.build(model.model.backbone).state_dict(), file)
        for text in ('plain', 'expand'):  # MMEngine would leave a plain one at random
            with pytest.raises(CheckpointError, match=what):
                made(LIGHT, text, file)


@pytest.mark.parametrize(('text', 'what'), [
    ('plain:lr', 'an option without a value: lr'),
    ('orepa:lr=', 'an option without a value: lr'),
    ('orepa:single_init=', 'an option without a value: single_init'),
    ('orepa:load_from=a,b.pth', 'an option without a value: b.pth'),
    ('orepa:', None), ('orepa:,', 'an option without a name'), ('orepa:=1', 'without a name'),
    ('orepa:a=[1,2', 'cannot be read'),
])
def test_options_that_cannot_be_read(text, what):
    if what is None:
        assert Variant.parse(text).settings == {}
        return
    with pytest.raises(ConfigError, match=what):
        Variant.parse(text)


def test_values_with_brackets_and_blanks():
    variant = Variant.parse('orepa:a=((0,1),[2,3]),lr=2,load_from=my weights/x.pth')
    assert variant.block_options == {'a': ((0, 1), [2, 3])}
    assert variant.settings == {'optim_wrapper.optimizer.lr': 2,
                                'load_from': 'my weights/x.pth'}


@pytest.mark.parametrize(('text', 'what'), [
    ('orepa:bogus=1', 'bogus'), ('orepa:block=none', 'none'), ('orepa:init_hyper_para=x', 'x'),
    ('plain:optim_wraper.optimizer.lr=1', 'has no optim_wraper'),
])
def test_options_that_do_not_exist(text, what):
    with pytest.raises(ConfigError, match=what):
        made(LIGHT, text)


def test_a_config_with_diverse_branch_blocks():
    """It is no OREPA, whatever its variant were called."""
    name = 'retinanet/retinanet_dbb-r50_fpn_1x_coco.py'
    assert made(name, 'dbb').model.backbone.type == 'DBBResNet'
    for text in ('orepa', 'orepa:single_init'):
        with pytest.raises(ConfigError, match='no OREPA layers'):
            made(name, text)


def test_dbb_of_a_class_and_of_its_whole_path():
    """As in configs of the lazy kind, and as they are written."""
    path = 'orepa_mm.backbones.det.OREPAResNet'
    for kind in (path, MODELS.get(path)):
        cfg = config(LIGHT)
        cfg.model.backbone.type = kind
        found = variant_config(cfg, Variant.parse('dbb')).model.backbone
        assert type(MODELS.build(found)) is MODELS.get('mmdet.DBBResNet')


@pytest.mark.parametrize(('name', 'text'), [
    (LIGHT, 'orepa:single_init'), (LIGHT, 'dbb'), (CLASSIFIER, 'orepa:init_hyper_para=0.5'),
    (REPVGG, 'orepa:block=repvgg_online')])
def test_a_variant_can_be_deployed_and_has_a_plain_one(name, text):
    """Options of the layers are no `conv_cfg` of the stock network."""
    with DefaultScope.overwrite_default_scope('mmpretrain' if 'imagenet' in name else 'mmdet'):
        cfg = made(name, text)
        for found in (deploy_config(cfg), variant_config(cfg, Variant.parse('plain'))):
            assert not list(reparam_layers(MODELS.build(found.model)))
