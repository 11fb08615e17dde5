"""`type='Expanded'`: a stock config in training form, that starts where the stock model starts."""

import copy
import pickle

import pytest
import torch
from helpers import ROOT, relative_error
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from orepa_mm import reparameterize
from orepa_mm.errors import CheckpointError, ConfigError, NothingToConvertError
from orepa_mm.export import deploy_config
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, reparam_layers

#: One of each scope whose parts take no `conv_cfg`, as small as it goes. RTMDet's head, MiT and
#: ShuffleNet initialise by loops over `nn.Conv2d`, which no block is.
MODELS_OF = {
    'mmdet': dict(
        type='RTMDet',
        backbone=dict(type='CSPNeXt', deepen_factor=0.167, widen_factor=0.125,
                      norm_cfg=dict(type='BN'), act_cfg=dict(type='SiLU')),
        neck=dict(type='CSPNeXtPAFPN', in_channels=[32, 64, 128], out_channels=16,
                  num_csp_blocks=1, norm_cfg=dict(type='BN'), act_cfg=dict(type='SiLU')),
        bbox_head=dict(
            type='RTMDetSepBNHead', num_classes=2, in_channels=16, feat_channels=16,
            stacked_convs=1, share_conv=True, with_objectness=False, exp_on_reg=False,
            anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
            bbox_coder=dict(type='DistancePointBBoxCoder'), norm_cfg=dict(type='BN'),
            act_cfg=dict(type='SiLU'))),
    'mmseg': dict(
        type='EncoderDecoder',
        backbone=dict(type='MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 1, 1],
                      num_heads=[1, 1, 1, 1]),
        decode_head=dict(type='SegformerHead', in_channels=[8] * 4, channels=8,
                         in_index=[0, 1, 2, 3], num_classes=3)),
    'mmpretrain': dict(
        type='ImageClassifier',
        backbone=dict(type='ShuffleNetV2', widen_factor=0.5, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=1024)),
}


@pytest.fixture(autouse=True)
def device():
    """On the CPU alone: random numbers are compared."""


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return MODELS.build(copy.deepcopy(cfg))


def expanded(cfg, **options):
    return {**cfg, 'type': 'Expanded', 'model_type': cfg['type'], 'expand': options}


def initialise(model, seed=1):
    torch.manual_seed(seed)
    model.init_weights()
    return model


def assert_same_weights(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


@pytest.mark.parametrize('scope', MODELS_OF)
def test_starts_where_the_stock_model_starts(scope):
    """Found from each package; both get the same random numbers, and are compared by weight."""
    init_default_scope(scope)
    stock, model = build(MODELS_OF[scope]), build(expanded(MODELS_OF[scope]))
    assert type(model) is type(stock)
    assert len(list(reparam_layers(model))) > 5
    assert_same_weights(reparameterize(model), stock)  # as built
    parameters = list(model.parameters())
    copied = copy.deepcopy(model)
    initialise(stock)
    assert_same_weights(reparameterize(initialise(model)), stock)
    # an optimizer may hold them before the runner initialises
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    # a copy initialises itself, not what it was copied from
    before = copy.deepcopy(model.state_dict())
    assert_same_weights(reparameterize(initialise(copied)), stock)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_same_weights(pickle.loads(pickle.dumps(model)), model)


def test_the_loop_over_convolutions_of_rtmdets_head_acts():
    """What a rule by name could not see: the head's towers start at a spread of 0.01."""
    init_default_scope('mmdet')
    model = initialise(build(expanded(MODELS_OF['mmdet'])))
    tower = model.bbox_head.cls_convs[0][0].conv
    assert isinstance(tower, OREPAConv2d)
    assert 0.009 < tower.weight.std() < 0.011


def test_only_a_part_of_a_model():
    init_default_scope('mmdet')
    cfg = copy.deepcopy(MODELS_OF['mmdet'])
    cfg['backbone'] = expanded(cfg['backbone'], exclude=['*.attention.*'])
    stock, model = build(MODELS_OF['mmdet']), build(cfg)
    assert isinstance(model.backbone.stage1[1].main_conv.conv, OREPAConv1x1)
    assert type(model.backbone.stage1[1].attention.fc) is nn.Conv2d
    assert not list(reparam_layers(model.neck))
    assert_same_weights(reparameterize(initialise(model)), initialise(stock))


def test_pretrained_weights_are_those_of_the_stock_model(tmp_path):
    init_default_scope('mmdet')
    stock = initialise(build(MODELS_OF['mmdet'], seed=5), seed=6)
    torch.save({'state_dict': {f'backbone.{key}': value for key, value
                               in stock.backbone.state_dict().items()}}, tmp_path / 'plain.pth')
    cfg = copy.deepcopy(MODELS_OF['mmdet'])
    cfg['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'plain.pth'),
                                       prefix='backbone.')
    model = initialise(build(expanded(cfg)))
    assert_same_weights(reparameterize(model.backbone), stock.backbone)


def test_weights_of_either_form_load_as_load_from_does(tmp_path):
    init_default_scope('mmdet')
    stock = initialise(build(MODELS_OF['mmdet'], seed=5), seed=6)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'plain.pth')
    model = build(expanded(MODELS_OF['mmdet']))
    load_checkpoint(model, str(tmp_path / 'plain.pth'))
    assert_same_weights(reparameterize(model), stock)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'training.pth')
    other = build(expanded(MODELS_OF['mmdet']), seed=9)
    load_checkpoint(other, str(tmp_path / 'training.pth'))
    assert_same_weights(other, model)


def test_weights_in_training_form_in_an_init_cfg_are_refused(tmp_path):
    """There they would meet plain convolutions; `load_from` is for them."""
    init_default_scope('mmdet')
    trained = build(expanded(MODELS_OF['mmdet']))
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'training.pth')
    model = build({**expanded(MODELS_OF['mmdet']), 'init_cfg': dict(
        type='Pretrained', checkpoint=str(tmp_path / 'training.pth'))})
    with pytest.raises(CheckpointError, match='is in training form, but the model is in plain'):
        model.init_weights()
    assert len(list(reparam_layers(model))) == len(list(reparam_layers(trained)))


class Failing(BaseModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def init_weights(self):
        nn.init.constant_(self.conv.weight, 2)
        raise ValueError('something')


def test_a_start_that_fails_leaves_the_blocks_in_place():
    MODELS.register_module(name='Failing', module=Failing, force=True)
    try:
        model = MODELS.build(dict(type='Expanded', model_type='Failing'))
        block = model.conv
        with pytest.raises(ValueError, match='something'):
            model.init_weights()
        assert model.conv is block
        assert isinstance(block, OREPAConv2d)
    finally:
        MODELS._module_dict.pop('Failing')


def test_bad_options_are_named():
    init_default_scope('mmdet')
    with pytest.raises(ConfigError, match='expand of a RTMDet has no option includes, inplace'):
        build(expanded(MODELS_OF['mmdet'], includes=['backbone.*'], inplace=True))
    with pytest.raises(NothingToConvertError, match='by name'):
        build(expanded(MODELS_OF['mmdet'], include=['no_such_part.*']))
    model = build(expanded(MODELS_OF['mmdet'], include='backbone.stem.*'))  # one pattern
    assert len(list(reparam_layers(model))) == 3


CHILD = '''
_base_ = '{}'
custom_imports = dict(imports=['orepa_mm'], allow_failed_imports=False)
'''


@pytest.mark.parametrize(('base', 'model_type'), [
    ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', 'YOLOX'),
    ('mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', 'EncoderDecoder'),
    ('mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py', 'ImageClassifier'),
])
def test_one_more_line_in_a_child_of_a_stock_config(base, model_type, tmp_path):
    """Nothing but the model's type changes, and the exported config is the stock one again."""
    lines = CHILD.format(base)
    (tmp_path / 'stock.py').write_text(lines)
    (tmp_path / 'ours.py').write_text(
        f"{lines}model = dict(type='Expanded', model_type='{model_type}')")
    stock, ours = (Config.fromfile(tmp_path / name) for name in ('stock.py', 'ours.py'))
    assert {**ours.to_dict(), 'model': None} == {**stock.to_dict(), 'model': None}
    assert {**ours.model, 'type': model_type} == {**stock.model, 'model_type': model_type}
    init_default_scope(ours.default_scope)
    assert deploy_config(ours).to_dict() == deploy_config(stock).to_dict()
    with torch.device('meta'):
        model, plain = MODELS.build(ours.model), MODELS.build(stock.model)
        assert type(model) is type(plain)
        assert len(list(reparam_layers(model))) > 20
        assert {k: v.shape for k, v in reparameterize(model).state_dict().items()} == {
            k: v.shape for k, v in plain.state_dict().items()}


def test_the_optimizer_decays_as_in_the_stock_config():
    """RTMDet: no decay of BN and biases, all else decayed, the branches as the kernel was."""
    cfg = Config.fromfile(ROOT / 'configs' / 'rtmdet' / 'rtmdet_orepa-tiny_8xb32-300e_coco.py')
    theirs = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    assert cfg.optim_wrapper == {**theirs.optim_wrapper, '_scope_': 'mmdet',
                                 'constructor': 'OREPAOptimWrapperConstructor'}
    init_default_scope('mmdet')
    model = build(expanded(MODELS_OF['mmdet']))
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: group['weight_decay'] for group in build_optim_wrapper(
        model, cfg.optim_wrapper).optimizer.param_groups for p in group['params']}
    norms = {f'{name}.{key}' for name, m in model.named_modules() if isinstance(
        m, nn.BatchNorm2d) for key in ('weight', 'bias')}
    for name, decay in decays.items():
        assert decay == (0 if name in norms or name.endswith('.bias') else 0.05), name
    assert any('.vector' in name or name.endswith('_origin') for name in decays)


def test_one_step_and_the_same_function_again():
    """Classifier: every branch learns, and the plain form computes what was trained."""
    init_default_scope('mmpretrain')
    model = initialise(build(expanded(MODELS_OF['mmpretrain'])))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.extract_feat(torch.randn(2, 3, 64, 64))[0].square().mean().backward()
    for layer in reparam_layers(model):
        assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    model.double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(reparameterize(model).extract_feat(x)[0],
                              model.extract_feat(x)[0]) < 1e-9
