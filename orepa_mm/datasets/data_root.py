"""Point a config at a folder of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ..errors import DataRootError
from .cityscapes_layout import apply_cityscapes, cityscapes_paths, is_cityscapes
from .coco_layout import apply_coco, coco_paths, coco_root, is_coco
from .config_walk import SPLITS, find_datasets, set_num_classes, type_name
from .imagenet_layout import apply_imagenet, imagenet_paths, is_imagenet

#: (whether a data set has this layout, what it reads, what points a config at a folder of it).
#: COCO comes last: what it looks for, an annotation file, others may have as well.
_LAYOUTS = ((is_cityscapes, cityscapes_paths, apply_cityscapes),
            (is_imagenet, imagenet_paths, apply_imagenet),
            (is_coco, coco_paths, apply_coco))


def apply_data_root(cfg: Config, root: str | Path, splits: Sequence[str] = SPLITS,
                    check: bool = True) -> Config:
    """Train and test on another folder, laid out as the config's data sets are.

    What the data sets are decides between the layouts of COCO (detection and
    instance segmentation), Cityscapes (semantic segmentation) and ImageNet
    (classification); names of files and folders stay those of the config. The
    class names are read from the folder, and `num_classes` is set in the model.
    Where a folder in COCO layout is expected, one in YOLO or Pascal VOC format
    is converted once, see `coco_root`.

    Args:
        cfg: The config; changed in place.
        root: The folder.
        splits: What the folder must hold, of `train`, `val` and `test`. The
            data sets for others are left without checks, and without class
            names, where the folder lacks their files.
        check: Whether images and labels are looked at; without, the config is
            pointed at what is there.

    Returns:
        The same config.

    Raises:
        DataRootError: If the folder does not fit, or the config's data sets
            have none of these layouts. `coco_root`, `apply_coco`,
            `apply_cityscapes` and `apply_imagenet` say what they look at.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DataRootError(f'--data-root {root} is no folder')
    datasets = find_datasets(cfg)
    needed = {id(dataset) for dataset in find_datasets(cfg, splits)}
    for matches, paths, apply in _LAYOUTS:
        if datasets and all(map(matches, datasets)):
            home = coco_root(cfg, root, splits, check) if apply is apply_coco else root
            found = [dataset for dataset in datasets if id(dataset) in needed
                     or all(path.exists() for path in paths(dataset, home))]
            classes = apply(cfg, found, home, check) if found else None
            for dataset in datasets:
                dataset['data_root'] = str(home)  # also where files are missing: no other set's
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
