"""Data: the generated toy set, and configs pointed at a user's own folder."""

from .data_root import DataRootError, apply_data_root
from .shapes import make_shapes_coco

__all__ = ['DataRootError', 'apply_data_root', 'make_shapes_coco']
