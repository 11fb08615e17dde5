"""The mmdet backbones: every option of the stock class, in both forms."""

import copy

import pytest
import torch
from helpers import randomize, relative_error
from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.registry import MODELS
from mmengine.model import PretrainedInit, revert_sync_batchnorm
from torch import nn

from orepa_mm.backbones.det import OREPAResNet, OREPAResNeXt
from orepa_mm.errors import CheckpointError, ConfigError
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from orepa_mm.reparam import is_training_form, reparameterize

NARROW = dict(depth=18, base_channels=8)
DEFORMABLE = dict(depth=50, base_channels=8, stage_with_dcn=(False, True, True, True),
                  dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False))


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_blocks_by_kernel_size():
    basic = OREPAResNet(**NARROW)
    assert isinstance(basic.conv1, OREPAStemConv2d)
    assert isinstance(basic.layer1[0].conv1, OREPAConv2d)
    assert type(basic.layer2[0].downsample[0]) is nn.Conv2d
    bottleneck = OREPAResNet(depth=50, base_channels=8)
    assert isinstance(bottleneck.layer1[0].conv1, OREPAConv1x1)
    assert isinstance(bottleneck.layer1[0].conv2, OREPAConv2d)
    assert isinstance(bottleneck.layer2[0].downsample[0], OREPAConv1x1)
    assert not [m for m in bottleneck.modules() if type(m) is nn.Conv2d]


def test_blocks_start_as_published_unless_a_rule_is_given():
    """The stock class has a rule for `Conv2d` of its own, which is for its plain ones."""
    def initialised(**kwargs):
        backbone = OREPAResNet(depth=18, base_channels=32, **kwargs)
        backbone.init_weights()
        return backbone

    backbone = initialised()
    block = backbone.layer1[0].conv1
    bound = block.weight_orepa_origin.abs().max().item()
    assert bound == pytest.approx((6 / (32 * 9)) ** 0.5, rel=0.02)
    assert block.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
    plain = backbone.layer2[0].downsample[0].weight  # the stock rule: normal, fan out
    assert plain.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    before = copy.deepcopy(backbone.state_dict())
    backbone.init_weights()  # a second time does nothing, as in the stock class
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    own = initialised(init_cfg=dict(type='Normal', layer='Conv2d', std=0.01))
    for layer in (own.layer1[0].conv1, own.conv1, own.layer2[0].downsample[0]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_deformable_convolutions_stay_the_others_do_not():
    block = OREPAResNet(**DEFORMABLE).layer2[0]
    assert type(block.conv2).__name__ == 'ModulatedDeformConv2dPack'
    for layer in (block.conv1, block.conv3, block.downsample[0]):
        assert isinstance(layer, OREPAConv1x1)
    assert block.downsample[0].stride == (2, 2)


def test_pretrained_weights_that_do_not_fit_are_an_error(tmp_path):
    source = OREPAResNet(**NARROW)
    state = {f'backbone.{key}': value for key, value in source.state_dict().items()}
    torch.save({'state_dict': {**state, 'head.fc.weight': torch.zeros(2, 2)}}, tmp_path / 'a.pth')

    def build(path, prefix='backbone.', **kwargs):
        backbone = OREPAResNet(**{**NARROW, **kwargs}, init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix=prefix))
        backbone.init_weights()
        return backbone

    loaded = build(tmp_path / 'a.pth')
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    with pytest.raises(CheckpointError, match='size mismatch'):
        build(tmp_path / 'a.pth', base_channels=16)
    with pytest.raises(CheckpointError, match='no key that begins with model'):
        build(tmp_path / 'a.pth', prefix='model')
    torch.save(ResNet(**NARROW).state_dict(), tmp_path / 'stock.pth')
    with pytest.raises(CheckpointError, match=r'conv1\.weight cannot be expanded.* too narrow'):
        build(tmp_path / 'stock.pth', prefix=None)
    del state['backbone.layer3.1.conv2.vector']
    torch.save(state, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match=r'no layer3\.1\.conv2\.vector'):
        build(tmp_path / 'b.pth')


#: The ways of a config to say that weights are loaded.
WAYS = {
    'dictionary': lambda path: dict(init_cfg=dict(type='Pretrained', checkpoint=path)),
    'list': lambda path: dict(init_cfg=[dict(type='Pretrained', checkpoint=path)]),
    'tuple': lambda path: dict(init_cfg=(dict(type='Pretrained', checkpoint=path),)),
    'after a rule': lambda path: dict(init_cfg=[
        dict(type='Kaiming', layer='Conv2d'), dict(type='Pretrained', checkpoint=path)]),
    'before a rule': lambda path: dict(init_cfg=[
        dict(type='Pretrained', checkpoint=path), dict(type='Constant', val=0, layer='Conv2d')]),
    'with a scope': lambda path: dict(init_cfg=[
        dict(type='mmengine.Pretrained', checkpoint=path)]),
    'class': lambda path: dict(init_cfg=[dict(type=PretrainedInit, checkpoint=path)]),
    'argument': lambda path: dict(pretrained=path),
}


@pytest.mark.filterwarnings('ignore:DeprecationWarning')
@pytest.mark.parametrize('way', WAYS)
def test_loading_is_strict_by_every_way_a_config_can_say_it(way, tmp_path):
    cfg = dict(depth=18, base_channels=8, stem_channels=32)  # a stem that can generate any kernel
    ours = randomize(OREPAResNet(**cfg))
    plain = reparameterize(ours).state_dict()
    for name, state in (('training', ours.state_dict()), ('plain', plain)):
        torch.save(state, tmp_path / f'{name}.pth')
        backbone = OREPAResNet(**cfg, **WAYS[way](str(tmp_path / f'{name}.pth')))
        backbone.init_weights()
        found = reparameterize(backbone).state_dict()
        for key, value in plain.items():
            assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5), key
        for lost in ('layer3.0.conv1', 'layer4.1.bn2'):
            part = {key: value for key, value in state.items() if not key.startswith(lost)}
            torch.save(part, tmp_path / 'part.pth')
            backbone = OREPAResNet(**cfg, **WAYS[way](str(tmp_path / 'part.pth')))
            with pytest.raises(CheckpointError, match=rf'part\.pth .*has no {lost}'):
                backbone.init_weights()


def test_an_override_beside_pretrained_weights_is_refused():
    backbone = OREPAResNet(**NARROW, init_cfg=dict(
        type='Pretrained', checkpoint='x.pth', override=dict(type='Normal', name='conv1')))
    with pytest.raises(ConfigError, match='overrides a part'):
        backbone.init_weights()


def test_the_deployed_form_takes_a_parameter_of_others_that_is_called_vector():
    """Only branches tell a training form."""
    backbone = OREPAResNet(**NARROW, deploy=True)
    backbone.attention = nn.Module()
    backbone.attention.vector = nn.Parameter(torch.zeros(3))
    backbone.load_state_dict(randomize(copy.deepcopy(backbone)).state_dict(), strict=True)
    assert backbone.attention.vector.any()
    with pytest.raises(CheckpointError, match='training form'):
        backbone.load_state_dict(OREPAResNet(**NARROW).state_dict(), strict=False)


def test_options_reach_the_layers():
    backbone = OREPAResNet(**NARROW, conv_cfg=dict(type='OREPA', single_init=True))
    assert backbone.layer1[0].conv1.vector[1:].eq(0).all()
    assert backbone.conv1.weight0.vector[1:].eq(0).all()


@pytest.mark.parametrize(('name', 'millions'), [
    # reference: the authors' trainable parameters, with their classifier
    ('r18', 37.8), ('r34', 71.7), ('r50', 68.6), ('r101', 122.5), ('r18 2x', 149.4),
    ('resnext50', 63.7)])
def test_number_of_parameters_is_the_published_one(name, millions):
    with torch.device('meta'):
        backbone = {
            'r18': lambda: OREPAResNet(18), 'r34': lambda: OREPAResNet(34),
            'r50': lambda: OREPAResNet(50), 'r101': lambda: OREPAResNet(101),
            'r18 2x': lambda: OREPAResNet(18, base_channels=128),
            'resnext50': lambda: OREPAResNeXt(depth=50, groups=32, base_width=4)}[name]()
    classifier = backbone.feat_dim * 1000 + 1000
    count = sum(p.numel() for p in backbone.parameters()) + classifier
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize('frozen', [-1, 0, 1, 4])
def test_frozen_stages(frozen):
    backbone = OREPAResNet(**NARROW, frozen_stages=frozen, norm_eval=False).train()
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, weight_decay=0.1)
    features = backbone(images())
    if frozen < 4:
        sum(f.square().mean() for f in features).backward()
    optimizer.step()
    changed = {key.split('.')[0] for key, value in backbone.state_dict().items()
               if not torch.equal(value, before[key])}
    stages = [{'conv1', 'bn1'}, {'layer1'}, {'layer2'}, {'layer3'}, {'layer4'}]
    assert changed == set().union(*stages[frozen + 1:])
    assert backbone.conv1.training is (frozen < 0)


def test_norm_eval():
    backbone = OREPAResNet(**NARROW, norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
    assert backbone.layer1[0].conv1.training


def test_with_cp_gives_the_same_gradients():
    plain = randomize(OREPAResNet(depth=50, base_channels=8, norm_eval=True)).train()
    checkpointed = OREPAResNet(depth=50, base_channels=8, norm_eval=True, with_cp=True).train()
    checkpointed.load_state_dict(plain.state_dict())
    for backbone in (plain, checkpointed):
        backbone.double()
        x = images().double().requires_grad_()
        sum(f.square().mean() for f in backbone(x)).backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters()):
        assert relative_error(other.grad, one.grad) < 1e-10


def test_switch_to_deploy_twice_and_in_parts():
    backbone = randomize(OREPAResNet(**NARROW)).eval()
    with torch.no_grad():
        expected = backbone(images())
        backbone.switch_to_deploy()
        assert backbone.deploy
        assert not is_training_form(backbone)
        backbone.switch_to_deploy()
        model = reparameterize(nn.Sequential(backbone))
        for one, other in zip(model(images()), expected):
            assert relative_error(one, other) < 1e-4


def test_sync_batchnorm_conversion_leaves_the_kernels():
    backbone = randomize(OREPAResNet(**NARROW)).eval()
    with torch.no_grad():
        expected = backbone(images())
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(backbone))
        assert isinstance(synced.bn1, nn.SyncBatchNorm)
        deployed = reparameterize(synced)
        assert isinstance(deployed.bn1, nn.SyncBatchNorm)
        for model in (synced, deployed):
            model = revert_sync_batchnorm(model)
            model.eval()
            for one, other in zip(model(images()), expected):
                assert relative_error(one, other) < 1e-4


def test_stock_classes_are_untouched():
    assert type(MODELS.build(dict(type='ResNet', **NARROW))) is ResNet
    assert MODELS.get('ResNeXt') is ResNeXt
