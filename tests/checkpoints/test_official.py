"""Strictness of the conversion of the authors' names; numbers are in tests/golden."""

import pytest
import torch
from helpers import golden, needs_golden

from orepa_mm.checkpoints import (
    CheckpointError,
    convert_checkpoint_file,
    convert_official_block,
    convert_official_state_dict,
)

pytestmark = needs_golden


@pytest.fixture
def network():
    return golden('net_resnet18_narrow')['state_dict']


def test_unknown_key_is_named(network):
    network['stage1.0.conv1.surprise'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'unknown key stage1\.0\.conv1\.surprise'):
        convert_official_state_dict(network)


def test_unknown_top_level_key_is_named(network):
    network['surprise.weight'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'unknown key surprise\.weight'):
        convert_official_state_dict(network)


@pytest.mark.parametrize('key', ['stage2.0.conv2.vector', 'stage3.0.shortcut.bn.running_var',
                                 'stage0.conv1.weight1.id_tensor', 'stage2.0.shortcut.conv.weight',
                                 'linear.bias'])
def test_missing_key_is_named(network, key):
    del network[key]
    with pytest.raises(CheckpointError, match=f'no key {key}'.replace('.', r'\.')):
        convert_official_state_dict(network)


def test_missing_or_additional_kernel_of_the_stem(network):
    more = {key.replace('weight2', 'weight3'): value for key, value in network.items()
            if key.startswith('stage0.conv1.weight2.')}
    with pytest.raises(CheckpointError, match=r'unknown key stage0\.conv1\.weight3'):
        convert_official_state_dict({**network, **more})
    fewer = {key: value for key, value in network.items() if '.weight2.' not in key}
    with pytest.raises(CheckpointError, match=r'no key stage0\.conv1\.weight2'):
        convert_official_state_dict(fewer)


def test_what_is_no_tensor_is_named(network):
    with pytest.raises(CheckpointError, match='unknown key surprise, which is no tensor'):
        convert_official_state_dict({**network, 'surprise': 3})


@pytest.mark.parametrize('key', ['stage1.0.conv1.vector', 'stage0.conv1.bn.bias', 'linear.bias',
                                 'stage0.conv1.weight1.weight_orepa_origin',
                                 'stage2.0.shortcut.bn.running_mean'])
def test_a_shape_that_does_not_fit_is_named(network, key):
    network[key] = network[key][:-1]
    with pytest.raises(CheckpointError, match=key.replace('.', r'\.')):
        convert_official_state_dict(network)


def test_missing_block_is_named(network):
    network = {k: v for k, v in network.items() if not k.startswith('stage3.0.shortcut.')}
    with pytest.raises(CheckpointError, match=r'no stage3\.0\.shortcut'):
        convert_official_state_dict(network)


def test_truncated_network_is_described(network):
    network = {k: v for k, v in network.items() if not k.startswith('stage4.1.')}
    with pytest.raises(CheckpointError, match=r'\(2, 2, 2, 1\) blocks'):
        convert_official_state_dict(network)


def test_a_stock_resnet_is_described():
    with pytest.raises(CheckpointError, match=r'begins with the keys conv1\.weight'):
        convert_official_state_dict({'conv1.weight': torch.zeros(1)})


def test_block_with_a_missing_or_unknown_key():
    block = golden('block_orepa_3x3')['state_dict']
    with pytest.raises(CheckpointError, match='unknown key surprise'):
        convert_official_block({**block, 'surprise': torch.zeros(1)})
    block.pop('vector')
    with pytest.raises(CheckpointError, match='no key vector'):
        convert_official_block(block)


def test_file_to_pretrained_weights(tmp_path, network):
    """The whole way of a user: convert, then build with init_cfg."""
    from mmdet.registry import MODELS

    torch.save({'state_dict': {f'module.{k}': v for k, v in network.items()}},
               tmp_path / 'authors.pth')
    target = tmp_path / 'new' / 'ours.pth'
    assert convert_checkpoint_file(tmp_path / 'authors.pth', target) == len(network)
    backbone = MODELS.build(dict(
        type='OREPAResNet', depth=18, base_channels=network['stage0.conv1.bn.weight'].numel(),
        init_cfg=dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')))
    backbone.init_weights()
    assert torch.equal(backbone.layer1[0].conv1.vector, network['stage1.0.conv1.vector'])
    assert torch.equal(backbone.bn1.running_mean, network['stage0.conv1.bn.running_mean'])
    with pytest.raises(FileExistsError, match='nothing is overwritten'):
        convert_checkpoint_file(tmp_path / 'authors.pth', target)
