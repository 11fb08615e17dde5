"""Finding and changing what a config says about data: what all the layouts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from mmengine.config import Config

#: What data are for; `<split>_dataloader` of a config reads them.
SPLITS = ('train', 'val', 'test')
#: Heads under these names count something else than the data set's classes.
_OTHER_HEADS = ('rpn_head', 'semantic_head')


def find_datasets(cfg: Config, splits: Sequence[str] = SPLITS) -> list[dict]:
    """The data sets for training, validation and testing, without their wrappers.

    Args:
        cfg: Any config.
        splits: Only those for these, of `SPLITS`.

    Returns:
        Their dictionaries in this order; what is changed in them changes the config.
    """
    return [dataset for name in splits
            for dataset in _unwrap((cfg.get(f'{name}_dataloader') or {}).get('dataset'))]


def type_name(dataset: dict) -> str:
    """The class of a data set, without the scope.

    Args:
        dataset: Its dictionary; `type` is a name as `'mmseg.CityscapesDataset'`, or a class.
    """
    type_ = dataset.get('type')
    return type_.rpartition('.')[2] if isinstance(type_, str) else getattr(type_, '__name__', '')


def dicts_with(key: str, value: object) -> Iterator[dict]:
    """Every dictionary that sets a key, inside nested dictionaries and lists.

    Args:
        key: The key; where its value is empty or None it counts as not set.
        value: A part of a config. Data pipelines in it are left out.

    Yields:
        The dictionaries, outer ones first.
    """
    if isinstance(value, dict):
        if value.get(key):
            yield value
        for name, item in value.items():
            if name != 'pipeline':
                yield from dicts_with(key, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from dicts_with(key, item)


def set_num_classes(value: object, num_classes: int) -> None:
    """Set every `num_classes` that is there already.

    Args:
        value: The model of a config, or a part of it; changed in place. Heads
            that do not tell the data set's classes apart are left out.
        num_classes: The number of classes.
    """
    if isinstance(value, dict):
        if 'num_classes' in value:
            value['num_classes'] = num_classes
        for key, item in value.items():
            if key not in _OTHER_HEADS:
                set_num_classes(item, num_classes)
    elif isinstance(value, (list, tuple)):
        for item in value:
            set_num_classes(item, num_classes)


def spread(total: int, number: int | None) -> list[int]:
    """Indices of a sample, spread evenly.

    Args:
        total: How many there are to choose from.
        number: How many to take at most; None: all.

    Returns:
        Different indices in their order; the last is among them if two are.
    """
    if number is None or number >= total:
        return list(range(total))
    return sorted({round(i) for i in np.linspace(0, total - 1, number)})


def _unwrap(dataset: object) -> Iterator[dict]:
    """What RepeatDataset, ConcatDataset and the like wrap, however deep."""
    if isinstance(dataset, (list, tuple)):
        for item in dataset:
            yield from _unwrap(item)
    elif isinstance(dataset, dict):
        inner = dataset.get('dataset') or dataset.get('datasets')
        if inner:
            yield from _unwrap(inner)
        else:
            yield dataset
