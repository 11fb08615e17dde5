"""Strictness of the conversion of the authors' names; numbers are in tests/golden."""

import re

import pytest
import torch
from helpers import golden, needs_golden

from orepa_mm.checkpoints import (
    convert_official_block,
    convert_official_state_dict,
    read_classifier,
    recognize_architecture,
)
from orepa_mm.checkpoints.official import read_plain_classifier
from orepa_mm.errors import CheckpointError

#: What the authors' files hold beside weights: buffers of the blocks that never change.
CONSTANTS = ('.id_tensor', '_avg_avg', '_prior')


@pytest.fixture
def network():
    return golden('net_resnet18_narrow')['state_dict']


@pytest.fixture
def repvgg():
    return golden('net_repvgg_narrow')['state_dict']


@needs_golden
def test_unknown_key_is_named(network):
    network['stage1.0.conv1.surprise'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'unknown key stage1\.0\.conv1\.surprise'):
        convert_official_state_dict(network)


@needs_golden
def test_unknown_top_level_key_is_named(network):
    network['surprise.weight'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'unknown key surprise\.weight'):
        convert_official_state_dict(network)


@needs_golden
@pytest.mark.parametrize('key', ['stage2.0.conv2.vector', 'stage3.0.shortcut.bn.running_var',
                                 'stage0.conv1.weight1.vector', 'stage2.0.shortcut.conv.weight',
                                 'linear.bias'])
def test_missing_key_is_named(network, key):
    del network[key]
    with pytest.raises(CheckpointError, match=f'no key {key}'.replace('.', r'\.')):
        convert_official_state_dict(network)


@needs_golden
def test_missing_or_additional_kernel_of_the_stem(network):
    more = {key.replace('weight2', 'weight3'): value for key, value in network.items()
            if key.startswith('stage0.conv1.weight2.')}
    with pytest.raises(CheckpointError, match=r'unknown key stage0\.conv1\.weight3'):
        convert_official_state_dict({**network, **more})
    fewer = {key: value for key, value in network.items() if '.weight2.' not in key}
    with pytest.raises(CheckpointError, match=r'no key stage0\.conv1\.weight2'):
        convert_official_state_dict(fewer)


@needs_golden
def test_what_is_no_tensor_is_named(network):
    with pytest.raises(CheckpointError, match='unknown key surprise, which is no tensor'):
        convert_official_state_dict({**network, 'surprise': 3})


@needs_golden
@pytest.mark.parametrize('key', ['stage1.0.conv1.vector', 'stage0.conv1.bn.bias', 'linear.bias',
                                 'stage0.conv1.weight1.weight_orepa_origin',
                                 'stage2.0.shortcut.bn.running_mean'])
def test_a_shape_that_does_not_fit_is_named(network, key):
    network[key] = network[key][:-1]
    with pytest.raises(CheckpointError, match=key.replace('.', r'\.')):
        convert_official_state_dict(network)


@needs_golden
def test_missing_block_is_named(network):
    network = {k: v for k, v in network.items() if not k.startswith('stage3.0.shortcut.')}
    with pytest.raises(CheckpointError, match=r'no key stage3\.0\.shortcut\.conv\.weight, '
                       r'stage3\.0\.shortcut\.bn\.\*: it is truncated'):
        convert_official_state_dict(network)


@needs_golden
def test_a_block_that_fits_itself_but_not_the_network(network):
    for key, value in network.items():
        if key.startswith('stage2.1.conv1.bn.') and value.dim():
            network[key] = torch.cat([value, value])
    with pytest.raises(CheckpointError, match=r'stage2\.1\.conv1\.bn\.weight has the shape '
                       r'\(32,\), where ResNet-18, 8 channels wide asks for \(16,\)'):
        convert_official_state_dict(network)


@needs_golden
@pytest.mark.parametrize('name', ['net_resnet18_narrow', 'net_resnext50_narrow',
                                  'net_repvgg_narrow'])
def test_constants_may_be_there_and_are_left_out(name):
    network = golden(name)['state_dict']
    bare = {key: value for key, value in network.items() if not key.endswith(CONSTANTS)}
    assert len(bare) < len(network)
    converted = convert_official_state_dict(network)
    assert {id(value) for value in converted.values()} == {id(value) for value in bare.values()}
    assert converted == convert_official_state_dict(bare)
    older = {**converted}  # in our names, with constants, as files were once written
    for key in network.keys() - bare.keys():
        layer = ('stage4.0.conv2.', 'backbone.layer4.0.conv2.')
        if name == 'net_repvgg_narrow':
            layer = ('stage2.1.rbr_dense.', 'backbone.stage_2.1.branch_3x3.conv.')
        if key.startswith(layer[0]):
            older[key.replace(*layer)] = network[key]
    assert len(older) == len(converted) + 3
    assert read_classifier(older) == (recognize_architecture(network), converted)


@needs_golden
@pytest.mark.parametrize(('name', 'key', 'ours'), [
    ('net_resnet18_narrow', 'stage3.1.conv2.weight_orepa_prior',
     'layer3.1.conv2.weight_orepa_prior'),
    ('net_resnet18_narrow', 'stage0.conv1.weight1.id_tensor', 'conv1.weight1.id_tensor'),
    ('net_repvgg_narrow', 'stage2.1.rbr_dense.weight_rbr_avg_avg',
     'stage_2.1.branch_3x3.conv.weight_rbr_avg_avg')])
def test_a_constant_of_another_shape_or_value_is_named(name, key, ours):
    network = golden(name)['state_dict']
    with pytest.raises(CheckpointError, match=re.escape(key) + ' has the shape'):
        convert_official_state_dict({**network, key: network[key][:-1]})
    with pytest.raises(CheckpointError, match=re.escape(ours) + ' of the checkpoint is not the'):
        convert_official_state_dict({**network, key: network[key] + 0.01})
    convert_official_state_dict({**network, key: network[key].half()})  # its rounding is no error


@needs_golden
def test_both_names_at_once(network):
    """A key of ours in a file of the authors is unknown, not a second of the same."""
    with pytest.raises(CheckpointError, match=r'unknown key head\.fc\.bias'):
        convert_official_state_dict({**network, 'head.fc.bias': network['linear.bias']})


@needs_golden
def test_names_of_a_repvgg(repvgg):
    converted = convert_official_state_dict(repvgg)
    for theirs, ours in (
            ('stage0.rbr_dense.vector', 'backbone.stem.branch_3x3.conv.vector'),
            ('stage0.rbr_dense.bn.weight', 'backbone.stem.branch_3x3.norm.weight'),
            ('stage2.1.rbr_1x1.conv.weight', 'backbone.stage_2.1.branch_1x1.conv.weight'),
            ('stage2.1.rbr_1x1.bn.running_var', 'backbone.stage_2.1.branch_1x1.norm.running_var'),
            ('stage2.1.rbr_identity.bias', 'backbone.stage_2.1.branch_norm.bias'),
            ('linear.bias', 'head.fc.bias')):
        assert converted[ours] is repvgg[theirs]
    assert len(converted) == len([key for key in repvgg if not key.endswith(CONSTANTS)])


@needs_golden
@pytest.mark.parametrize('key', [
    'stage2.1.rbr_dense.vector', 'stage0.rbr_dense.weight_rbr_avg_conv',
    'stage3.0.rbr_1x1.bn.bias', 'stage2.1.rbr_identity.weight',
    'stage1.0.rbr_1x1.conv.weight', 'linear.bias'])
def test_missing_key_or_misfitting_shape_of_a_repvgg(repvgg, key):
    name = key.replace('.', r'\.')
    value = repvgg.pop(key)
    with pytest.raises(CheckpointError, match=f'no key {name}'):
        convert_official_state_dict(repvgg)
    with pytest.raises(CheckpointError, match=f'{name} has the shape'):
        convert_official_state_dict({**repvgg, key: value[:-1]})


@needs_golden
@pytest.mark.parametrize('key', ['stage2.0.rbr_identity.weight', 'stage1.0.se.down.weight',
                                 'stage1.0.rbr_dense.weight_rbr_1x1', 'gap.weight'])
def test_unknown_key_of_a_repvgg(repvgg, key):
    repvgg[key] = torch.zeros(16)
    with pytest.raises(CheckpointError, match='unknown key ' + key.replace('.', r'\.')):
        convert_official_state_dict(repvgg)


@needs_golden
@pytest.mark.parametrize('key', ['stage1.0.conv1.vector', 'stage2.0.shortcut.bn.running_mean',
                                 'linear.weight'])
def test_what_is_no_weight_is_named(network, key):
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(CheckpointError, match=f'{re.escape(key)} is of type {dtype}'):
            convert_official_state_dict({**network, key: network[key].to(dtype)})
    for value in (float('nan'), float('inf')):
        network[key].view(-1)[3] = value
        with pytest.raises(CheckpointError, match=f'{re.escape(key)} holds .* not finite'):
            convert_official_state_dict(network)


def test_block_with_a_missing_or_unknown_key():
    block = golden('block_orepa_3x3')['state_dict']
    with pytest.raises(CheckpointError, match='unknown key surprise'):
        convert_official_block({**block, 'surprise': torch.zeros(1)})
    for key in ('vector', 'weight_orepa_origin', 'bn.bias'):
        with pytest.raises(CheckpointError, match=f'no key {key}'):
            convert_official_block({k: v for k, v in block.items() if k != key})


def test_constants_of_a_block_are_left_out():
    block = golden('block_orepa_3x3_g4')['state_dict']
    bare = {key: value for key, value in block.items()
            if not f'.{key}'.endswith(CONSTANTS)}
    assert len(bare) == len(block) - 3
    conv, bn = convert_official_block(block)
    assert len(conv) + len(bn) == len(bare)
    assert (conv, bn) == convert_official_block(bare)
    with pytest.raises(CheckpointError, match='id_tensor has the shape'):
        convert_official_block({**block, 'id_tensor': block['id_tensor'][:-1]})


def test_plain_block():
    conv = torch.nn.Conv2d(4, 6, 1, bias=False).state_dict()
    bn = torch.nn.BatchNorm2d(6).state_dict()
    block = {**{f'conv.{k}': v for k, v in conv.items()}, **{f'bn.{k}': v for k, v in bn.items()}}
    assert convert_official_block(block) == (conv, bn)
    block['bn.bias'] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r'bn\.bias has the shape \(5,\), where .* \(6,\)'):
        convert_official_block(block)


@pytest.mark.parametrize('key', ['encoder.weight', 'backbone.layer1.0.conv1.weight_orepa_origin'])
def test_what_is_no_plain_classifier_is_named(key):
    with pytest.raises(CheckpointError, match=f'no plain ResNet .*begins with {re.escape(key)}$'):
        read_plain_classifier({key: torch.zeros(1)})
