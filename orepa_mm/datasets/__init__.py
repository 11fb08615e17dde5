"""Data: the generated toy sets, and configs pointed at a user's own folder."""

from .data_root import apply_data_root
from .shapes import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet

__all__ = ['apply_data_root', 'make_shapes_cityscapes', 'make_shapes_coco',
           'make_shapes_imagenet']
