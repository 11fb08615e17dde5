"""The re-parameterizable backbones for MMSegmentation."""

from mmseg.models.backbones import ResNet, ResNetV1c, ResNeXt
from mmseg.registry import MODELS

from .mixin import DBBMixin, OREPAMixin


@MODELS.register_module()
class OREPAResNet(OREPAMixin, ResNet):
    """MMSegmentation's `ResNet`, whose stem is 7 x 7, with OREPA convolutions.

    The backbone of the authors' ImageNet checkpoints. Arguments: those of the
    stock class, and `deploy` and `conv_cfg` as of `ReparamBackboneMixin`.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class OREPAResNetV1c(OREPAMixin, ResNetV1c):
    """MMSegmentation's `ResNetV1c`, whose stem is three 3 x 3, with OREPA convolutions.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNetV1c'


@MODELS.register_module()
class OREPAResNeXt(OREPAMixin, ResNeXt):
    """MMSegmentation's `ResNeXt` with OREPA convolutions.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNeXt'


@MODELS.register_module()
class DBBResNet(DBBMixin, ResNet):
    """MMSegmentation's `ResNet` with Diverse Branch Blocks, the offline baseline.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNet'


@MODELS.register_module()
class DBBResNetV1c(DBBMixin, ResNetV1c):
    """MMSegmentation's `ResNetV1c` with Diverse Branch Blocks.

    Arguments: as of `OREPAResNet`.
    """

    stock_type = 'ResNetV1c'
