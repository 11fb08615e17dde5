"""The re-parameterizable backbones for MMDetection."""

from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.registry import MODELS

from .mixin import DBBMixin, OREPAMixin


@MODELS.register_module()
class OREPAResNet(OREPAMixin, ResNet):
    """MMDetection's `ResNet` (18, 34, 50, 101, 152) with OREPA convolutions.

    Wide ones by `base_channels`. Arguments: those of the stock class, and
    `deploy` and `conv_cfg` as of `ReparamBackboneMixin`.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class OREPAResNeXt(OREPAMixin, ResNeXt):
    """MMDetection's `ResNeXt` (50, 101, 152) with OREPA convolutions.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNeXt'


@MODELS.register_module()
class DBBResNet(DBBMixin, ResNet):
    """MMDetection's `ResNet` with Diverse Branch Blocks, the offline baseline.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNet'
