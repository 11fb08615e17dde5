"""Our backbones against the authors' networks, and against their files' keys."""

import mmpretrain.registry
import pytest
import torch
from helpers import golden, needs_golden, official_keys, on_meta_device, relative_error
from mmdet.registry import MODELS

from orepa_mm.checkpoints import convert_official_state_dict, recognize_architecture
from orepa_mm.reparam import reparameterize

NETWORKS = {
    'net_resnet18_narrow': dict(type='OREPAResNet', depth=18),
    'net_resnet50_narrow': dict(type='OREPAResNet', depth=50),
    'net_resnext50_narrow': dict(type='OREPAResNeXt', depth=50, groups=4, base_width=1),
}
OFFICIAL = {
    'ResNet-18': dict(type='OREPAResNet', depth=18),
    'ResNet-34': dict(type='OREPAResNet', depth=34),
    'ResNet-50': dict(type='OREPAResNet', depth=50),
    'ResNet-101': dict(type='OREPAResNet', depth=101),
    'ResNet-18-2x': dict(type='OREPAResNet', depth=18, base_channels=128),
    'ResNeXt-50': dict(type='OREPAResNeXt', depth=50, groups=32, base_width=4),
}
#: What the authors store although it is no parameter; a layer makes it itself.
CONSTANTS = ('avg_avg', 'prior', 'id_tensor')
REPVGG = dict(type='mmpretrain.OREPARepVGG', out_indices=(0, 1, 2, 3))


def backbone_weights(state_dict):
    return {key.removeprefix('backbone.'): value for key, value in state_dict.items()
            if key.startswith('backbone.')}


def network(name):
    """The record of a narrow network, our backbone with its weights, and its stem."""
    record = golden(name)
    if name == 'net_repvgg_narrow':
        arch = dict(group_layer_map=None, se_cfg=None, **{
            key: record['meta'][key] for key in ('num_blocks', 'width_factor')})
        backbone = MODELS.build(dict(**REPVGG, arch=arch))
        stem = lambda backbone, x: backbone.stem(x)
    else:
        # narrow: the stem has as many channels as the first stage
        width = record['state_dict']['stage0.conv1.bn.weight'].numel()
        backbone = MODELS.build(dict(**NETWORKS[name], base_channels=width))
        stem = lambda backbone, x: backbone.maxpool(
            backbone.relu(backbone.norm1(backbone.conv1(x))))
    converted = convert_official_state_dict(record['state_dict'])
    backbone.load_state_dict(backbone_weights(converted), strict=True)
    return record, backbone.double().eval(), stem


@needs_golden
@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deployed'])
@pytest.mark.parametrize('name', [*NETWORKS, 'net_repvgg_narrow'])
def test_every_stage(name, deploy):
    record, backbone, stem = network(name)
    if deploy:
        backbone = reparameterize(backbone)
        assert not any(key.endswith('.vector') for key in backbone.state_dict())
    with torch.no_grad():
        x = record['x'].double()
        stages = [stem(backbone, x), *backbone(x)]
        logits = (stages[-1].mean(dim=(2, 3)) @ record['state_dict']['linear.weight'].double().T
                  + record['state_dict']['linear.bias'].double())
    assert len(stages) == len(record['stages'])
    expected = record['stages']
    expected = list(expected.values()) if isinstance(expected, dict) else expected
    for number, (found, stage) in enumerate(zip(stages, expected)):
        assert relative_error(found, stage) < 1e-7, f'stage{number}'
    assert relative_error(logits, record['logits']) < 1e-7


@pytest.mark.parametrize('name', [*OFFICIAL, 'RepVGG-A0', 'RepVGG-A1', 'RepVGG-A2'])
def test_official_checkpoint_covers_the_backbone(name):
    """By hand in MMDetection's arguments, and as recognised in MMPretrain's."""
    shapes = official_keys()[name]
    official = {f'module.{key}': torch.empty(shape, device='meta')
                for key, shape in shapes.items()}
    converted = convert_official_state_dict({'state_dict': official})
    assert len(converted) == len([key for key in official if not key.endswith(CONSTANTS)])
    weights = backbone_weights(converted)
    assert len(weights) + 2 == len(converted)
    recognized = recognize_architecture(converted).backbone
    builds = [lambda: mmpretrain.registry.MODELS.build(
        {**recognized, 'type': f'mmpretrain.{recognized["type"]}'})]
    if name in OFFICIAL:
        builds.append(lambda: MODELS.build(OFFICIAL[name]))
    for build in builds:
        with on_meta_device():
            backbone = build()
        backbone.load_state_dict(weights, strict=True, assign=True)
        assert {key: value.shape for key, value in backbone.state_dict().items()} == {
            key: value.shape for key, value in weights.items()}
        last = [module for module in backbone.modules() if hasattr(module, 'num_features')][-1]
        assert converted['head.fc.weight'].shape[1] == last.num_features
