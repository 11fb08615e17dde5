"""RepVGG whose blocks are one generated convolution with one BN each."""

import copy

import pytest
import torch
from helpers import randomize, relative_error, vary_scales
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from orepa_mm.checkpoints import recognize_architecture
from orepa_mm.checkpoints.architectures import build_backbone
from orepa_mm.errors import CheckpointError
from orepa_mm.layers import OREPARepVGGOnlineConv2d, reparam_layers
from orepa_mm.reparam import reparameterize

SE = dict(ratio=4, divisor=1)
STAGES = (0, 1, 2, 3)


def config(block='repvgg_online', deploy=False, se_cfg=None, **options):
    arch = {'num_blocks': [1, 2, 2, 1], 'width_factor': [0.125] * 4, 'group_layer_map': {2: 2},
            'se_cfg': se_cfg}
    return dict(type='OREPARepVGG', out_indices=STAGES, arch=arch, deploy=deploy,
                conv_cfg=dict(type='OREPA', block=block), **options)


def stock(deploy, **options):
    cfg = config(deploy=deploy, **options)
    return MODELS.build({**cfg, 'type': 'mmpretrain.RepVGG', 'conv_cfg': None})


def images(dtype=torch.float32):
    return torch.randn(2, 3, 64, 64, dtype=dtype)


def test_a_block_is_one_convolution_with_one_norm():
    backbone = MODELS.build(config(se_cfg=SE))
    blocks = [module for module in backbone.modules() if isinstance(module, RepVGGBlock)]
    assert len(blocks) == 7
    twins = [module for module in stock(False, se_cfg=SE).modules()
             if isinstance(module, RepVGGBlock)]
    for block, twin in zip(blocks, twins, strict=True):
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        assert norms == [block.branch_3x3.norm]
        conv, = reparam_layers(block)
        assert type(conv) is OREPARepVGGOnlineConv2d
        assert conv.bias is None
        assert ('identity' in conv.branch_names) == (twin.branch_norm is not None)
        other = twin.branch_3x3.conv
        for name in ('kernel_size', 'stride', 'padding', 'dilation', 'groups', 'in_channels'):
            assert getattr(conv, name) == getattr(other, name)
        plain = [m for m in block.modules() if type(m) is nn.Conv2d]
        assert len(plain) == 2  # of squeeze-and-excitation
    assert sum('identity' in conv.branch_names for conv in reparam_layers(backbone)) == 2


@torch.no_grad()
def test_a_block_is_the_sum_of_its_branches_normalized_activated():
    block = randomize(MODELS.build(config(se_cfg=SE))).double().eval().stage_2[1]
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    kernels = block.branch_3x3.conv.branch_kernels()
    summed = sum(nn.functional.conv2d(x, kernel, padding=1, groups=block.groups)
                 for name, kernel in kernels.items() if name != 'identity')
    summed = summed + x * block.branch_3x3.conv.vector[-1].view(-1, 1, 1)
    norm = block.branch_3x3.norm
    expected = nn.functional.batch_norm(summed, norm.running_mean, norm.running_var, norm.weight,
                                        norm.bias, eps=norm.eps)
    assert relative_error(block(x), block.se_layer(expected).relu()) < 1e-10


@torch.no_grad()
def test_deployed_it_loads_into_the_stock_class():
    backbone = randomize(MODELS.build(config())).double().eval()
    x = images(torch.float64)
    expected = backbone(x)
    deployed = stock(True).double()
    deployed.eval()
    deployed.load_state_dict(reparameterize(backbone).state_dict(), strict=True)
    for block in backbone.modules():
        if isinstance(block, RepVGGBlock):
            block.switch_to_deploy()  # by itself, as tools of others do
    for found in (deployed(x), backbone(x)):
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-9


def test_it_starts_as_published_and_loads_what_it_saved():
    backbone = MODELS.build(config())
    backbone.init_weights()
    for layer in reparam_layers(backbone):
        assert layer.vector[:, 0].tolist() == [0.25, 0.25, 0, 0.5, 1, 0.5, 1][:len(layer.vector)]
        assert layer.weight_online_1x1_kxk_idconv1.abs().max() == 0
    vary_scales(backbone)
    other = MODELS.build(config())
    load_state_dict(other, backbone.state_dict(), strict=True)
    with torch.no_grad():
        x = images()
        for one, two in zip(other.eval()(x), backbone.eval()(x), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize('se_cfg', [None, SE])
def test_copies_and_checkpointing_train_alike(se_cfg):
    """A deep copy in the middle of training, and one that computes its activations twice."""
    backbone = randomize(MODELS.build(config(se_cfg=se_cfg)))
    x = images().requires_grad_()
    backbone(x)
    others = copy.deepcopy(backbone), MODELS.build(config(se_cfg=se_cfg, with_cp=True))
    others[1].load_state_dict(backbone.state_dict())

    def gradients(model):
        sum(out.square().mean() for out in model(x)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(backbone)
    for other in others:
        for name, grad in gradients(other).items():
            assert relative_error(grad, expected[name]) < 1e-4, name


def test_frozen_stages():
    backbone = MODELS.build(config(frozen_stages=2, norm_eval=True)).train()
    frozen = (backbone.stem, backbone.stage_1, backbone.stage_2)
    for stage in frozen:
        assert not any(p.requires_grad for p in stage.parameters())
        assert not any(module.training for module in stage.modules())
    assert all(p.requires_grad for p in backbone.stage_3.parameters())
    assert not any(m.training for m in backbone.modules() if isinstance(m, _BatchNorm))
    deployed = reparameterize(backbone)
    assert not any(p.requires_grad for p in deployed.stage_2.parameters())
    assert all(p.requires_grad for p in deployed.stage_3.parameters())


def other_repvgg(kind):
    """Every RepVGG whose weights do not fit."""
    return {'stock': lambda: stock(False), 'deployed': lambda: stock(True),
            'three BN': lambda: MODELS.build(config('repvgg'))}[kind]().state_dict()


@pytest.mark.parametrize(('kind', 'said'), [
    ('stock', r"one BN per block \(block='repvgg_online'\), but .* a BN in each branch"),
    ('three BN', r"one BN per block \(block='repvgg_online'\), but .* a BN in each branch"),
    ('deployed', r'is in plain form, but the model is in training form(.|\n)*deployed RepVGG')])
def test_weights_of_another_repvgg_are_refused(kind, said):
    backbone = MODELS.build(config())
    before = copy.deepcopy(backbone.state_dict())
    for model, prefix in ((backbone, ''), (nn.ModuleDict({'backbone': backbone}), 'backbone.')):
        state = {f'{prefix}{key}': value for key, value in other_repvgg(kind).items()}
        with pytest.raises(CheckpointError, match=said):
            load_state_dict(model, state, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_its_weights_are_refused_by_another_repvgg():
    state = MODELS.build(config()).state_dict()
    with pytest.raises(CheckpointError, match=r'a BN in each branch .* but .* one BN per block'):
        load_state_dict(MODELS.build(config('repvgg')), state)
    for plain in (stock(True), MODELS.build(config(deploy=True))):
        with pytest.raises(CheckpointError, match=r'training form'):
            load_state_dict(plain, state)


@pytest.mark.parametrize('arch', ['A0', 'B1', config()['arch']])
def test_a_classifier_is_recognized(arch):
    architecture = {'type': 'OREPARepVGG', 'arch': arch,
                    'conv_cfg': dict(type='OREPA', block='repvgg_online')}
    if isinstance(arch, dict):
        architecture['arch'] = {**arch, 'group_layer_map': None, 'stem_channels': 8}
    with torch.device('meta'):
        state = MODELS.build(architecture).state_dict()
    *_, features = (value.numel() for key, value in state.items() if key.endswith('running_var'))
    found = recognize_architecture({**{f'backbone.{key}': value for key, value in state.items()},
                                    'head.fc.weight': torch.zeros(3, features)})
    assert found.backbone == architecture
    assert 'with one BN per block' in found.name
    assert build_backbone(found).state_dict().keys() == state.keys()
