"""Data: the generated toy sets, and configs pointed at a user's own folder."""

from .config_walk import DataRootError
from .data_root import apply_data_root
from .shapes import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet

__all__ = ['DataRootError', 'apply_data_root', 'make_shapes_cityscapes', 'make_shapes_coco',
           'make_shapes_imagenet']
