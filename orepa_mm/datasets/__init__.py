"""Data: the generated toy sets, configs pointed at a user's own folder, and a check of both."""

from .check_annotations import require_usable_data
from .config_walk import SPLITS
from .data_root import apply_data_root
from .shapes import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet

__all__ = ['SPLITS', 'apply_data_root', 'make_shapes_cityscapes', 'make_shapes_coco',
           'make_shapes_imagenet', 'require_usable_data']
