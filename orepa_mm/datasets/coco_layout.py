"""Folders in COCO layout: `annotations/instances_train2017.json`, `train2017/` and so on.

Folders in YOLO and Pascal VOC format become such ones, see `coco_root`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from ..errors import DataRootError
from .config_walk import SPLITS, dicts_with, find_datasets
from .conversion import conversion_of, converted
from .voc_source import is_voc, read_voc
from .yolo_source import is_yolo, read_yolo

#: Formats other than COCO's: the name, what shows it, whether a folder has it, what reads it.
_FORMATS = (('YOLO', 'data.yaml', is_yolo, read_yolo),
            ('Pascal VOC', 'JPEGImages and Annotations', is_voc, read_voc))


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


def coco_root(cfg: Config, root: Path, splits: Sequence[str] = SPLITS, check: bool = True) -> Path:
    """Where the annotations of a folder are in COCO layout.

    Which split an annotation file of the config is for is taken from its name,
    which says `train`, `val`, `test` or `trainval`, else from the data loader.

    Args:
        cfg: A config whose data sets read annotation files.
        root: The folder.
        splits: What the folder must hold, of `train`, `val` and `test`.
        check: Whether boxes without an outline are an error where masks are read.

    Returns:
        The folder itself, if it has all that one of the data sets reads, or no
        other format either; else a folder in the cache, see `converted`.

    Raises:
        DataRootError: If the folder could be of several formats, is incomplete,
            or what it holds cannot be converted.
    """
    datasets = find_datasets(cfg)
    found = [entry for entry in _FORMATS if entry[2](root)]
    if any(all(path.exists() for path in coco_paths(dataset, root)) for dataset in datasets):
        for name, sign, *_ in found:
            print_log(f'{root} is read in COCO layout; what it has in {name} format ({sign}) is '
                      'left alone', 'current')
        return root
    paths = [Path(path) for dataset in datasets for path in (
        dataset['ann_file'], *filter(None, (dataset.get('data_prefix') or {}).values()))]
    if not found or any(path.is_absolute() or '..' in path.parts for path in paths) or any(
            Path(dataset['ann_file']).suffix != '.json' for dataset in datasets):
        return root
    if len(found) > 1:
        both = ' and '.join(f'{name} ({sign})' for name, sign, *_ in found)
        raise DataRootError(f'{root} could be read in two formats, {both}: leave only one of them '
                            'in the folder')
    files = _splits_of_files(cfg)
    source = found[0][3](root, sorted({*files.values()}))
    needed = find_datasets(cfg, splits)
    folders = {prefix for dataset in datasets
               for prefix in (dataset.get('data_prefix') or {}).values() if prefix}
    home = converted(root, source, files, folders,
                     sorted({files[dataset['ann_file']] for dataset in needed}))
    for dataset in needed if check else []:
        _require_outlines(dataset, root, conversion_of(home, home / dataset['ann_file']))
    return home


def _splits_of_files(cfg: Config) -> dict[str, str]:
    """The split that each annotation file is for."""
    files: dict[str, str] = {}
    for split in SPLITS:
        for dataset in find_datasets(cfg, [split]):
            named = re.search('trainval|train|val|test', Path(dataset['ann_file']).name)
            files.setdefault(dataset['ann_file'], named[0] if named else split)
    return files


def _require_outlines(dataset: dict, root: Path, content: dict) -> None:
    if 'seg' in (dataset.get('data_prefix') or {}):
        raise DataRootError(f'the config reads label maps of stuff, which {root} does not have: '
                            'choose a config for boxes or masks')
    missing = content['labels'] - content['outlines']
    if missing and any(dicts_with('with_mask', dataset.get('pipeline'))):
        raise DataRootError(f'the config reads masks, but {missing} of {content["labels"]} labels '
                            f'for {content["split"]} in {root} are boxes without an outline: '
                            'choose a config for boxes, such as one of Faster R-CNN or RetinaNet')


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
        raise DataRootError(f'{annotation} is missing; annotation files below {root}: {found}'
                            + _other_formats(root))
    try:
        content = json.loads(annotation.read_text())
        names = tuple(category['name'] for category in content['categories'])
        different = len(set(names)) == len(names)
    except (ValueError, KeyError, TypeError) as error:
        raise DataRootError(f'{annotation} is not in COCO format '
                            f'({type(error).__name__}: {error})') from error
    if not names or not different:
        raise DataRootError(f'{annotation} needs categories with different names, has {names}')
    return names


def _other_formats(root: Path) -> str:
    """What else was looked for, and where it is if it is one folder further down."""
    looked = ' and '.join(f'{name} format ({sign})' for name, sign, *_ in _FORMATS)
    below = [path.name for path in sorted(root.iterdir()) if path.is_dir()
             and any(matches(path) for *_, matches, _ in _FORMATS)]
    return f'. Looked for as well: {looked}' + (
        f'; give the folder below it that has one: {", ".join(below)}' if below else ', none there')


def _relative(path: str, roots: set[str]) -> str:
    """The part of an evaluator's path below the data root that the config had."""
    for root in sorted(roots, key=len, reverse=True):
        if root and path.startswith(root):
            return path[len(root):].lstrip('/')
    return path
