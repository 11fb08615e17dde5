"""Our blocks against numbers from the authors' implementation, in float64."""

import pytest
import torch
from helpers import GOLDEN_DATA, golden, relative_error
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orepa_mm.backbones.cls import deploy_repvgg_block
from orepa_mm.checkpoints import convert_official_block
from orepa_mm.layers import DBBConv2d, OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

LAYERS = {'OREPA': OREPAConv2d, 'OREPA_1x1': OREPAConv1x1, 'OREPA_LargeConv': OREPAStemConv2d}
BLOCKS = ['block_orepa_1x1_expand', 'block_orepa_1x1_reduce_s2', 'block_orepa_3x3',
          'block_orepa_3x3_g4', 'block_orepa_3x3_g8', 'block_orepa_3x3_s2', 'block_stem_7x7']
TOLERANCE = 1e-7


def build(record):
    meta = record['meta']
    conv = LAYERS[meta['block']](
        meta['in_channels'], meta['out_channels'], meta['kernel_size'], meta['stride'],
        meta['padding'], groups=meta['groups'], bias=False)
    bn = nn.BatchNorm2d(meta['out_channels'])
    conv_state, bn_state = convert_official_block(record['state_dict'])
    conv.load_state_dict(conv_state, strict=True)
    bn.load_state_dict(bn_state, strict=True)
    return nn.Sequential(conv, bn).double()


@pytest.mark.parametrize('name', BLOCKS)
def test_eval_output(name):
    record = golden(name)
    block = build(record).eval()
    with torch.no_grad():
        assert relative_error(block(record['x'].double()), record['y_eval']) < TOLERANCE


@pytest.mark.parametrize('name', BLOCKS)
def test_equivalent_kernel_and_bias(name):
    record = golden(name)
    conv, bn = build(record).eval()
    fused = fuse_conv_bn_eval(conv.to_conv2d(), bn)
    assert relative_error(fused.weight, record['kernel']) < TOLERANCE
    assert relative_error(fused.bias, record['bias']) < TOLERANCE


@pytest.mark.parametrize('name', BLOCKS)
def test_train_output_and_every_gradient(name):
    record = golden(name)
    block = build(record).train()
    x = record['x'].double().requires_grad_()
    y = block(x)
    assert relative_error(y, record['y_train']) < TOLERANCE
    (y * record['grad_output']).sum().backward()
    assert relative_error(x.grad, record['grad_x']) < TOLERANCE
    conv, bn = block
    found = {name: p.grad for name, p in conv.named_parameters()}
    found.update({f'bn.{name}': p.grad for name, p in bn.named_parameters()})
    assert found.keys() == record['grads'].keys()
    for parameter, expected in record['grads'].items():
        assert relative_error(found[parameter], expected) < TOLERANCE, parameter


# --- blocks that hold their BN themselves: RepVGG and DBB ------------------------------

OWN_BN = ['block_repvgg_orepa_identity', 'block_repvgg_orepa_s2', 'block_repvgg_base_identity',
          'block_dbb_3x3', 'block_dbb_3x3_g2']
#: The authors' names of a RepVGG block and MMPretrain's, longer ones first.
REPVGG_NAMES = (('rbr_dense.bn.', 'branch_3x3.norm.'), ('rbr_dense.conv.', 'branch_3x3.conv.'),
                ('rbr_dense.', 'branch_3x3.conv.'), ('rbr_1x1.bn.', 'branch_1x1.norm.'),
                ('rbr_1x1.conv.', 'branch_1x1.conv.'), ('rbr_identity.', 'branch_norm.'))


def renamed(name, key):
    if 'repvgg' not in name:
        return key
    theirs, ours = next(pair for pair in REPVGG_NAMES if key.startswith(pair[0]))
    return ours + key.removeprefix(theirs)


def build_own_bn(name):
    """The block in float64 with the golden weights, by our or the stock package's class."""
    record = golden(name)
    meta = record['meta']
    sizes = (meta['in_channels'], meta['out_channels'])
    if 'repvgg' in name:
        conv_cfg = dict(type='OREPA', block='repvgg', pointwise=False)
        block = RepVGGBlock(*sizes, stride=meta['stride'], groups=meta['groups'],
                            conv_cfg=conv_cfg if 'orepa' in name else None)
    else:
        block = DBBConv2d(*sizes, 3, meta['stride'], meta['padding'], groups=meta['groups'],
                          bias=False)
    block.load_state_dict({renamed(name, key): value
                           for key, value in record['state_dict'].items()}, strict=True)
    return block.double(), record


@pytest.mark.parametrize('name', OWN_BN)
def test_own_bn_eval_output_and_equivalent_convolution(name):
    block, record = build_own_bn(name)
    block.eval()
    with torch.no_grad():
        assert relative_error(block(record['x'].double()), record['y_eval']) < TOLERANCE
        if 'repvgg' in name:
            deploy_repvgg_block(block)
            conv = block.branch_reparam
            assert relative_error(block(record['x'].double()), record['y_eval']) < TOLERANCE
        else:
            conv = block.to_conv2d()
    assert relative_error(conv.weight, record['kernel']) < TOLERANCE
    assert relative_error(conv.bias, record['bias']) < TOLERANCE


@pytest.mark.parametrize('name', OWN_BN)
def test_own_bn_train_output_and_every_gradient(name):
    block, record = build_own_bn(name)
    x = record['x'].double().requires_grad_()
    y = block.train()(x)
    assert relative_error(y, record['y_train']) < TOLERANCE
    (y * record['grad_output']).sum().backward()
    assert relative_error(x.grad, record['grad_x']) < TOLERANCE
    found = {key: p.grad for key, p in block.named_parameters()}
    expected = {renamed(name, key): grad for key, grad in record['grads'].items()}
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert relative_error(found[key], grad) < TOLERANCE, key


def test_every_stored_block_is_compared():
    """And a clone stays small."""
    stored = {path.name.removesuffix('.pt.gz') for path in GOLDEN_DATA.glob('block_*')}
    assert stored == {*BLOCKS, *OWN_BN}
    assert sum(path.stat().st_size for path in GOLDEN_DATA.iterdir()) <= 1_200_000
