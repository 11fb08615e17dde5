"""Folders in COCO layout: `annotations/instances_train2017.json`, `train2017/` and so on."""

from __future__ import annotations

import json
from pathlib import Path

from mmengine.config import Config

from ..errors import DataRootError
from .config_walk import dicts_with


def is_coco(dataset: dict) -> bool:
    """Whether a data set reads an annotation file.

    Args:
        dataset: Its dictionary in the config.
    """
    return bool(dataset.get('ann_file'))


def coco_paths(dataset: dict, root: Path) -> list[Path]:
    """What a data set reads from a folder in COCO layout.

    Args:
        dataset: Its dictionary in the config.
        root: The folder.

    Returns:
        The annotation file, then the folders of images.
    """
    prefixes = dict(dataset.get('data_prefix') or {})
    return [root / dataset['ann_file'], *(root / folder for kind, folder in prefixes.items()
                                          if kind in ('img', 'img_path'))]


def apply_coco(cfg: Config, datasets: list[dict], root: Path,
               check: bool = True) -> tuple[str, ...]:
    """Point data sets and evaluators at a folder in COCO layout.

    The names of the annotation files and image folders stay those of the config.

    Args:
        cfg: The config; changed in place.
        datasets: Its data sets, from `find_datasets`.
        root: The folder.
        check: Whether a missing folder of images is an error.

    Returns:
        The class names, which are those of the annotation files.

    Raises:
        DataRootError: If a file or folder is missing, an annotation file is not
            in COCO format, or its categories differ from the first one's.
    """
    old_roots = {str(dataset.get('data_root') or '') for dataset in datasets}
    classes, source = None, None
    for dataset in datasets:
        annotation, *folders = coco_paths(dataset, root)
        names = _class_names(annotation, root)
        if classes is None:
            classes, source = names, annotation
        elif names != classes:
            raise DataRootError(f'the categories of {annotation} are {names}, but those of '
                                f'{source} are {classes}: make them the same, in the same order')
        for folder in folders:
            if check and not folder.is_dir():
                raise DataRootError(f'{folder} is missing: the config reads images of '
                                    f'{annotation.name} from there')
        dataset['data_root'] = str(root)
        # replaces metainfo as a whole: a palette of other classes must not stay
        dataset['metainfo'] = {'classes': classes}
    for name in ('val', 'test'):
        for evaluator in dicts_with('ann_file', cfg.get(f'{name}_evaluator')):
            evaluator['ann_file'] = str(root / _relative(evaluator['ann_file'], old_roots))
    # finds a head whose config left num_classes to its default
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='NumClassCheckHook')]
    return classes


def _class_names(annotation: Path, root: Path) -> tuple[str, ...]:
    """Names in the file's own order, which is the order of mmdet's labels."""
    if not annotation.is_file():
        found = sorted(str(path.relative_to(root)) for path in root.glob('*/*.json')) or 'none'
        raise DataRootError(f'{annotation} is missing; annotation files below {root}: {found}')
    try:
        content = json.loads(annotation.read_text())
        names = tuple(category['name'] for category in content['categories'])
    except (ValueError, KeyError, TypeError) as error:
        raise DataRootError(f'{annotation} is not in COCO format '
                            f'({type(error).__name__}: {error})') from error
    if not names or len(set(names)) != len(names):
        raise DataRootError(f'{annotation} needs categories with different names, has {names}')
    return names


def _relative(path: str, roots: set[str]) -> str:
    """The part of an evaluator's path below the data root that the config had."""
    for root in sorted(roots, key=len, reverse=True):
        if root and path.startswith(root):
            return path[len(root):].lstrip('/')
    return path
