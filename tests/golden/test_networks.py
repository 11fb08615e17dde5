"""Our backbones against the authors' networks, and against their files' keys."""

import json

import pytest
import torch
from helpers import GOLDEN, golden, needs_golden, relative_error
from mmdet.registry import MODELS

from orepa_mm.checkpoints import convert_official_state_dict
from orepa_mm.deploy import reparameterize

pytestmark = needs_golden

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


def backbone_weights(state_dict):
    return {key.removeprefix('backbone.'): value for key, value in state_dict.items()
            if key.startswith('backbone.')}


@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deployed'])
@pytest.mark.parametrize('name', NETWORKS)
def test_every_stage(name, deploy):
    record = golden(name)
    # narrow: the stem has as many channels as the first stage
    width = record['state_dict']['stage0.conv1.bn.weight'].numel()
    backbone = MODELS.build(dict(**NETWORKS[name], base_channels=width))
    converted = convert_official_state_dict(record['state_dict'])
    backbone.load_state_dict(backbone_weights(converted), strict=True)
    backbone.double().eval()
    if deploy:
        backbone = reparameterize(backbone)
    with torch.no_grad():
        x = record['x'].double()
        stem = backbone.maxpool(backbone.relu(backbone.norm1(backbone.conv1(x))))
        stages = [stem, *backbone(x)]
        logits = (stages[-1].mean(dim=(2, 3)) @ converted['head.fc.weight'].double().T
                  + converted['head.fc.bias'].double())
    assert len(stages) == len(record['stages'])
    expected = record['stages']
    expected = list(expected.values()) if isinstance(expected, dict) else expected
    for number, (found, stage) in enumerate(zip(stages, expected)):
        assert relative_error(found, stage) < 1e-7, f'stage{number}'
    assert relative_error(logits, record['logits']) < 1e-7


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_checkpoint_covers_the_backbone(name):
    shapes = json.loads((GOLDEN / 'official_checkpoint_keys.json').read_text())[name]
    official = {f'module.{key}': torch.empty(shape, device='meta')
                for key, shape in shapes.items()}
    converted = convert_official_state_dict({'state_dict': official})
    assert len(converted) == len(official)
    with torch.device('meta'):
        backbone = MODELS.build(OFFICIAL[name])
    weights = backbone_weights(converted)
    backbone.load_state_dict(weights, strict=True, assign=True)
    assert {key: value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in weights.items()}
    assert converted['head.fc.weight'].shape[1] == backbone.feat_dim
    assert len(weights) + 2 == len(converted)
