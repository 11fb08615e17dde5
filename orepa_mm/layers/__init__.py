"""The method: squeeze functions, the conv layers over them, and their factories."""

from .base import ReparamConv2d
from .branches import branched_layers, mean_similarity, relative_norms, shares, similarities
from .builder import build_dbb_conv, build_orepa_conv
from .dbb import DBBConv2d
from .folded import FoldedNorm
from .orepa import OREPAConv1x1, OREPAConv2d, OREPARepVGGConv2d, OREPARepVGGOnlineConv2d
from .sharing import cached
from .stem import OREPAStemConv2d
from .stock import conv2d_like
from .surgery import adjacent_children, reparam_layers, replace_with_conv2d

__all__ = ['DBBConv2d', 'FoldedNorm', 'OREPAConv1x1', 'OREPAConv2d', 'OREPARepVGGConv2d',
           'OREPARepVGGOnlineConv2d', 'OREPAStemConv2d', 'ReparamConv2d', 'adjacent_children',
           'branched_layers', 'build_dbb_conv', 'build_orepa_conv', 'cached', 'conv2d_like',
           'mean_similarity', 'relative_norms', 'reparam_layers', 'replace_with_conv2d', 'shares',
           'similarities']
