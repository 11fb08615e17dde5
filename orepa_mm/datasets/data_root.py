"""Point a config at a data set in COCO layout of the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

#: Heads under these names count something else than the data set's classes.
_OTHER_HEADS = ('rpn_head', 'semantic_head')


class DataRootError(ValueError):
    """A folder is not laid out as the config expects; the message says how it is."""


def apply_data_root(cfg: Config, root: str | Path) -> Config:
    """Train and test a detection config on another folder in COCO layout.

    The names of the annotation files and image folders stay those of the
    config (`annotations/instances_train2017.json`, `train2017/` and so on).
    The class names are read from the annotation files, and `num_classes` is set
    in every head.

    Args:
        cfg: A config whose data sets and evaluators are COCO's; changed in place.
        root: The folder.

    Returns:
        The same config.

    Raises:
        DataRootError: If a file or folder is missing, an annotation file is not
            in COCO format, or its categories differ from the first one's.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise DataRootError(f'--data-root {root} is no folder')
    datasets = [dataset for name in ('train', 'val', 'test')
                for dataset in _dicts_with('ann_file', cfg.get(f'{name}_dataloader'))]
    if not datasets:
        raise DataRootError('--data-root: the config has no data set with an annotation file, '
                            'so it is not one of COCO layout')
    old_roots = {str(dataset.get('data_root') or '') for dataset in datasets}
    classes, source = None, None
    for dataset in datasets:
        annotation = root / dataset['ann_file']
        names = _class_names(annotation, root)
        if classes is None:
            classes, source = names, annotation
        elif names != classes:
            raise DataRootError(f'the categories of {annotation} are {names}, but those of '
                                f'{source} are {classes}: make them the same, in the same order')
        for kind, folder in dict(dataset.get('data_prefix') or {}).items():
            if kind in ('img', 'img_path') and not (root / folder).is_dir():
                raise DataRootError(f'{root / folder} is missing: the config reads images of '
                                    f'{annotation.name} from there')
        dataset['data_root'] = str(root)
        # replaces metainfo as a whole: a palette of other classes must not stay
        dataset['metainfo'] = {'classes': classes}
    for name in ('val', 'test'):
        for evaluator in _dicts_with('ann_file', cfg.get(f'{name}_evaluator')):
            evaluator['ann_file'] = str(root / _relative(evaluator['ann_file'], old_roots))
    cfg.data_root = str(root)
    _set_num_classes(cfg.model, len(classes))
    # finds a head whose config left num_classes to its default
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='NumClassCheckHook')]
    return cfg


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


def _set_num_classes(model: object, num_classes: int) -> None:
    if isinstance(model, dict):
        if 'num_classes' in model:
            model['num_classes'] = num_classes
        for key, value in model.items():
            if key not in _OTHER_HEADS:
                _set_num_classes(value, num_classes)
    elif isinstance(model, (list, tuple)):
        for value in model:
            _set_num_classes(value, num_classes)


def _dicts_with(key: str, value: object) -> Iterator[dict]:
    """Every dictionary with `key` inside nested data set wrappers and lists."""
    if isinstance(value, dict):
        if value.get(key):
            yield value
        for name, item in value.items():
            if name != 'pipeline':
                yield from _dicts_with(key, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _dicts_with(key, item)
