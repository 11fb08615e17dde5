"""Our blocks against numbers from the authors' implementation, in float64."""

import pytest
import torch
from helpers import golden, needs_golden, relative_error
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orepa_mm.checkpoints import convert_official_block
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

pytestmark = needs_golden

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
