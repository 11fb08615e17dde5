"""Folders in ImageNet layout: `train/<class>/*.png`, `val/<class>/*.png`."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import list_dir_or_file

from ..errors import DataRootError
from .config_walk import dicts_with, find_datasets, type_name


def is_imagenet(dataset: dict) -> bool:
    """Whether a data set is one of mmpretrain's that can read class folders.

    Args:
        dataset: Its dictionary in the config.
    """
    return type_name(dataset) in ('ImageNet', 'CustomDataset')


def imagenet_paths(dataset: dict, root: Path) -> list[Path]:
    """What a data set reads from a folder in ImageNet layout.

    Args:
        dataset: Its dictionary in the config.
        root: The folder.

    Returns:
        One path: the folder that the class folders are in.

    Raises:
        DataRootError: If the config does not name it.
    """
    return [root / _folder_name(dataset)]


def apply_imagenet(cfg: Config, datasets: list[dict], root: Path,
                   check: bool = True) -> tuple[str, ...]:
    """Point data sets at a folder in ImageNet layout.

    The folders stay those that the config names by `split` or `data_prefix`.
    Lists of images (`meta/train.txt`) are not used. Top-k accuracies for a `k`
    larger than the number of classes are left out.

    Args:
        cfg: The config; changed in place.
        datasets: Its data sets, from `find_datasets`.
        root: The folder.
        check: Whether classes without images are an error.

    Returns:
        The class names: the sorted names of the folders in the first data
        set's folder, which is `train/` where there are images to train on.

    Raises:
        DataRootError: If a folder is missing, holds fewer than two class
            folders or no images, has other classes than the first one, or a
            class has no images to train on.
    """
    classes, source = None, None
    for_training = {id(dataset) for dataset in find_datasets(cfg, ['train'])}
    for dataset in datasets:
        folder = root / _folder_name(dataset)
        _use_class_folders(dataset, root)
        names = _class_folders(folder, root)
        if classes is None:
            classes, source = names, folder
        elif names != classes:
            # mmpretrain compares the number only
            raise DataRootError(
                f'{folder} has other classes than {source}: missing are '
                f'{sorted(set(classes) - set(names)) or "none"}, additional are '
                f'{sorted(set(names) - set(classes)) or "none"}')
        dataset['metainfo'] = {'classes': classes}
        empty = _classes_without_images(dataset, folder, classes) if check else []
        needs_all = folder == source and id(dataset) in for_training
        if (needs_all and empty) or len(empty) == len(classes):
            raise DataRootError(f'{folder} has no images of {", ".join(empty)}: they are looked '
                                f'for in {folder / empty[0]} and so on')
    for part in (cfg.model, cfg.get('val_evaluator'), cfg.get('test_evaluator')):
        _limit_topk(part, len(classes))
    return classes


def _folder_name(dataset: dict) -> str:
    prefix = dataset.get('data_prefix') or ''
    folder = prefix.get('img_path') if isinstance(prefix, dict) else prefix
    folder = folder or dataset.get('split')
    if not folder:
        raise DataRootError('a data set of the config has neither split nor data_prefix: set one '
                            'to the name of its folder, train or val')
    return folder


def _use_class_folders(dataset: dict, root: Path) -> None:
    """Let the data set read class folders."""
    folder = _folder_name(dataset)
    # ImageNet stands for its thousand classes; with a split, it would read lists in meta/
    dataset['type'] = 'mmpretrain.CustomDataset'
    dataset['data_root'] = str(root)
    dataset['data_prefix'] = folder
    for key in ('split', 'ann_file'):
        dataset.pop(key, None)


def _class_folders(folder: Path, root: Path) -> tuple[str, ...]:
    """Names in the order of mmpretrain's labels."""
    from mmpretrain.datasets.custom import find_folders

    if not folder.is_dir():
        raise DataRootError(f'{folder} is missing; {root} holds '
                            f'{sorted(p.name for p in root.iterdir()) or "nothing"}')
    names, _ = find_folders(str(folder))
    if len(names) < 2:
        raise DataRootError(f'{folder} needs a folder of images for each of at least two classes, '
                            f'has {names or "no folder"}')
    return tuple(names)


def _classes_without_images(dataset: dict, folder: Path, classes: tuple[str, ...]) -> list[str]:
    from mmpretrain.registry import DATASETS

    # it knows which files are images; lazy: it shall not list all of them here
    built = DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': True})
    return [name for name in classes if not any(map(built.is_valid_file, list_dir_or_file(
        folder / name, list_dir=False, recursive=True)))]


def _limit_topk(value: object, num_classes: int) -> None:
    for owner in dicts_with('topk', value):
        topk = owner['topk'] if isinstance(owner['topk'], (list, tuple)) else (owner['topk'],)
        if max(topk) > num_classes:
            owner['topk'] = tuple(k for k in topk if k <= num_classes) or (1,)
