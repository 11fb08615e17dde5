"""The OREPA backbones for MMDetection."""

from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.registry import MODELS

from .mixin import OREPABackboneMixin


@MODELS.register_module()
class OREPAResNet(OREPABackboneMixin, ResNet):
    """MMDetection's `ResNet` (18, 34, 50, 101, 152) with OREPA convolutions.

    Wide ones by `base_channels`. Arguments: `OREPABackboneMixin`, and those of
    the stock class.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class OREPAResNeXt(OREPABackboneMixin, ResNeXt):
    """MMDetection's `ResNeXt` (50, 101, 152) with OREPA convolutions.

    Arguments: `OREPABackboneMixin`, and those of the stock class.
    """

    stock_type = 'ResNeXt'
