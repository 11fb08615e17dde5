"""To which size a config brings images: said once, for it decides what a network sees."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from ..datasets import SPLITS
from ..datasets.config_walk import type_name

#: Arguments of transforms that set a size.
_SIZES = ('scale', 'scales', 'crop_size')


def describe_image_size(cfg: Config) -> str:
    """One line that says how images are resized and cropped, and how to change it.

    Args:
        cfg: Any config.

    Returns:
        For example `image size: train RandomResize scale=(256, 256); val, test Resize
        scale=(256, 256). Another: --cfg-options ...`; empty if no transform says a size.
    """
    found: dict[str, list[str]] = {}
    options = []
    for split in SPLITS:
        where = f'{split}_dataloader.dataset'
        sizes = list(_sizes((cfg.get(f'{split}_dataloader') or {}).get('dataset'), where))
        options += [name for name, _, _ in sizes]
        if sizes:
            text = ', '.join(f'{kind} {name.rpartition(".")[2]}={value}'
                             for name, kind, value in sizes)
            found.setdefault(text, []).append(split)
    if not found:
        return ''
    if (cfg.model.get('data_preprocessor') or {}).get('size'):  # a segmentor pads to it
        options.append('model.data_preprocessor.size')
    return ('image size: ' + '; '.join(f'{", ".join(splits)} {text}'
                                       for text, splits in found.items())
            + '. Another: --cfg-options '
            + ' '.join(f'{name}={shlex.quote("(W,H)")}' for name in options))


def _sizes(value: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """Name in the config, transform and value of each size inside a data set, wrappers too."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _sizes(item, f'{where}.{index}')
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == 'pipeline':
                for index, transform in enumerate(item or ()):
                    for size in _SIZES:
                        if isinstance(transform, dict) and isinstance(
                                transform.get(size), (int, list, tuple)):
                            yield (f'{where}.pipeline.{index}.{size}', type_name(transform),
                                   transform[size])
            elif name in ('dataset', 'datasets'):
                yield from _sizes(item, f'{where}.{name}')
