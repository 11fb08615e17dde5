"""The method: squeeze functions, the conv layers over them, and their factory."""

from .base import ReparamConv2d
from .builder import build_orepa_conv
from .convert import replace_with_conv2d
from .orepa import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d

__all__ = ['OREPAConv1x1', 'OREPAConv2d', 'OREPAStemConv2d', 'ReparamConv2d',
           'build_orepa_conv', 'replace_with_conv2d']
