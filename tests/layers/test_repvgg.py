"""The k x k of the OREPA-RepVGG block, branch by branch on the feature map."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from mmcv.cnn import build_conv_layer
from torch import nn

from orepa_mm.layers import OREPARepVGGConv2d, build_orepa_conv


def branches_on_feature_map(layer, x):
    """What the five branches make of the feature map, each by stock convolutions."""
    g, o, where = layer.groups, layer.out_channels, dict(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    w = {name.removeprefix('weight_rbr_'): tensor
         for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
    w = {name: tensor.to(x.dtype) for name, tensor in w.items()}
    depthwise_map = F.conv2d(x, w['gconv_dw'], groups=layer.in_channels, **where)
    first = (w['1x1_kxk_idconv1'] + w['id_tensor'] if 'id_tensor' in w
             else w['1x1_kxk_conv1'])

    def window(kernel, y):
        return F.conv2d(y, kernel.view(-1, 1, 3, 3), groups=o, **where)

    # the authors number the outputs of the pointwise as (o/g, g)
    pointwise = w['gconv_pw'].view(o // g, g, -1, 1, 1).transpose(0, 1).reshape(o, -1, 1, 1)
    separable = F.conv2d(depthwise_map, pointwise, groups=g)
    # ... and lay the result out as an ordinary grouped kernel
    rows = torch.stack([
        F.conv2d(x, w['origin'], groups=g, **where),
        window(w['avg_avg'].expand(o, 3, 3), F.conv2d(x, w['avg_conv'], groups=g)),
        window(w['prior'], F.conv2d(x, w['pfir_conv'], groups=g)),
        F.conv2d(F.conv2d(x, first, groups=g), w['1x1_kxk_conv2'], groups=g, **where),
        separable])
    return (rows * layer.vector[:5, None, :, None, None]).sum(dim=0)


@pytest.mark.parametrize('options', [
    dict(out_channels=8, padding=1), dict(out_channels=12, padding=1, stride=2),
    dict(out_channels=8, padding=2, dilation=2), dict(out_channels=8, padding=1, groups=2),
    dict(out_channels=8, padding=1, groups=8)])
def test_sum_of_the_branches(options):
    layer = randomize(OREPARepVGGConv2d(8, kernel_size=3, bias=False, **options)).double()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert relative_error(layer(x), branches_on_feature_map(layer, x)) < 1e-10


def test_rows_and_initial_values():
    with_identity = OREPARepVGGConv2d(16, 16, 3, padding=1)
    assert with_identity.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 0.5, 0.0]
    for layer in (OREPARepVGGConv2d(16, 32, 3), OREPARepVGGConv2d(16, 16, 3, stride=2)):
        assert layer.vector[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 0.5]
    # Kaiming-uniform with a = 1: bound sqrt(3 / fan_in)
    bound = OREPARepVGGConv2d(64, 64, 3).weight_rbr_origin.abs().max().item()
    assert bound == pytest.approx((3 / 576) ** 0.5, rel=0.02)
    assert with_identity.weight_rbr_1x1_kxk_idconv1.abs().max() == 0
    depthwise = OREPARepVGGConv2d(8, 8, 3, groups=8)
    assert depthwise.weight_rbr_1x1_kxk_conv1.shape == (16, 1, 1, 1)
    assert depthwise.weight_rbr_1x1_kxk_conv1.abs().max() > 0


def test_through_the_conv_layer_type():
    cfg = dict(type='OREPA', block='repvgg', pointwise=False)
    assert type(build_conv_layer(cfg, 4, 4, 3, padding=1)) is OREPARepVGGConv2d
    assert type(build_conv_layer(cfg, 4, 4, 1)) is nn.Conv2d
    with pytest.raises(ValueError, match=r"block='vgg'.*orepa, repvgg"):
        build_orepa_conv(4, 4, 3, block='vgg')
