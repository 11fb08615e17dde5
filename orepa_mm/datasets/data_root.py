"""Point a config at a folder of the user's own."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from ..errors import DataRootError
from .cityscapes_layout import apply_cityscapes, is_cityscapes
from .coco_layout import apply_coco, is_coco
from .config_walk import find_datasets, set_num_classes, type_name
from .imagenet_layout import apply_imagenet, is_imagenet

#: (whether a data set has this layout, what points a config at a folder of it).
#: COCO comes last: what it looks for, an annotation file, others may have as well.
_LAYOUTS = ((is_cityscapes, apply_cityscapes), (is_imagenet, apply_imagenet),
            (is_coco, apply_coco))


def apply_data_root(cfg: Config, root: str | Path) -> Config:
    """Train and test on another folder, laid out as the config's data sets are.

    What the data sets are decides between the layouts of COCO (detection and
    instance segmentation), Cityscapes (semantic segmentation) and ImageNet
    (classification); names of files and folders stay those of the config. The
    class names are read from the folder, and `num_classes` is set in the model.

    Args:
        cfg: The config; changed in place.
        root: The folder.

    Returns:
        The same config.

    Raises:
        DataRootError: If the folder does not fit, or the config's data sets
            have none of these layouts. `apply_coco`, `apply_cityscapes` and
            `apply_imagenet` say what they look at.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DataRootError(f'--data-root {root} is no folder')
    datasets = find_datasets(cfg)
    for matches, apply in _LAYOUTS:
        if datasets and all(map(matches, datasets)):
            classes = apply(cfg, datasets, root)
            break
    else:
        found = ', '.join(sorted({type_name(dataset) for dataset in datasets})) or 'none'
        raise DataRootError(
            '--data-root needs a config whose data sets all have the same layout: that of COCO '
            '(with an annotation file), of Cityscapes (CityscapesDataset of mmseg) or of '
            f'ImageNet (ImageNet or CustomDataset of mmpretrain); its data sets: {found}')
    if classes is not None:
        set_num_classes(cfg.model, len(classes))
        # mmpretrain's is beside the model
        set_num_classes(cfg.get('data_preprocessor'), len(classes))
    cfg.data_root = str(root)
    return cfg
