"""All that knows MMEngine."""

from . import conv_types
from .patches import patch

__all__ = ['conv_types', 'patch']

patch()
