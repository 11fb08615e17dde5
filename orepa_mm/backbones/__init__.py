"""The backbones, registered under the same names for each OpenMMLab package."""

from .mixin import ReparamBackboneMixin
from .registration import register_backbones

__all__ = ['ReparamBackboneMixin', 'register_backbones']

register_backbones()
