"""Folders in Cityscapes layout: `leftImg8bit/train/<city>/`, `gtFine/train/<city>/` and so on."""

from __future__ import annotations

import colorsys
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_from_file

from ..errors import DataRootError
from .config_walk import dicts_with, spread, type_name

#: Optional file of class names in the folder: one per line, in the order of the train ids.
CLASSES_FILE = 'classes.txt'
#: Label files of each data set whose values are looked at.
_SAMPLE = 10


def is_cityscapes(dataset: dict) -> bool:
    """Whether a data set is one of mmseg's that reads Cityscapes' files.

    mmdet has a `CityscapesDataset` too, but that one reads a COCO annotation file.

    Args:
        dataset: Its dictionary in the config.
    """
    prefix = dataset.get('data_prefix')
    return (type_name(dataset) in ('CityscapesDataset', 'BaseSegDataset')
            and isinstance(prefix, dict) and 'seg_map_path' in prefix)


def cityscapes_paths(dataset: dict, root: Path) -> list[Path]:
    """What a data set reads from a folder in Cityscapes layout.

    Args:
        dataset: Its dictionary in the config.
        root: The folder.

    Returns:
        The folders of images and label files, and the list of images if the config names one.
    """
    return [root / path for path in (*dataset['data_prefix'].values(), dataset.get('ann_file'))
            if path]


def apply_cityscapes(cfg: Config, datasets: list[dict], root: Path,
                     check: bool = True) -> tuple[str, ...] | None:
    """Point data sets at a folder in Cityscapes layout.

    The classes stay those of the config (the 19 of Cityscapes), unless the
    folder holds a `classes.txt`. Every image must have its label file; the
    values of label files are looked at in a sample.

    Args:
        cfg: The config; changed in place.
        datasets: Its data sets, from `find_datasets`.
        root: The folder.
        check: Whether images and label files are looked at.

    Returns:
        The class names of `classes.txt`, or None without one.

    Raises:
        DataRootError: If a folder, the images or a label file is missing, a
            label value stands for no class, `classes.txt` does not name at
            least two different classes, or the model's losses weigh another
            number of classes.
    """
    classes = None
    if (root / CLASSES_FILE).is_file():
        classes = _read_classes(root / CLASSES_FILE)
        _check_class_weights(cfg.model, len(classes))
    for dataset in datasets:
        dataset['data_root'] = str(root)
        if classes is not None:
            _set_classes(dataset, classes)
        if check:
            _check(dataset, root)
    return classes


def distinct_palette(num_colours: int) -> list[list[int]]:
    """Colours all round the hue circle, every second one darker.

    mmseg alone would draw them at random.

    Args:
        num_colours: How many, at most 255.

    Returns:
        As many different [red, green, blue], each value from 0 to 255.
    """
    colours = [colorsys.hsv_to_rgb(i / num_colours, 0.9, (1.0, 0.6)[i % 2])
               for i in range(num_colours)]
    return [[round(255 * value) for value in colour] for colour in colours]


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        # utf-8-sig: editors may have put a byte order mark before the first name
        lines = list_from_file(str(path), encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataRootError(f'{path} is no UTF-8 text: {error}') from error
    # an empty line between names is an error: the names below it would be off by one
    names = tuple('\n'.join(line.strip() for line in lines).strip().split('\n'))
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names) or not all(names):
        raise DataRootError(f'{path} needs 2 to 255 different class names, one per line in the '
                            f'order of the train ids; it has {names}')
    return names


def _set_classes(dataset: dict, classes: tuple[str, ...]) -> None:
    if type_name(dataset) == 'CityscapesDataset':
        # CityscapesDataset takes no names but its own, and would reorder the labels by them
        dataset['type'] = 'mmseg.BaseSegDataset'
        dataset.setdefault('img_suffix', '_leftImg8bit.png')
        dataset.setdefault('seg_map_suffix', '_gtFine_labelTrainIds.png')
    dataset['metainfo'] = {'classes': classes, 'palette': distinct_palette(len(classes))}


def _check_class_weights(model: dict, num_classes: int) -> None:
    for loss in dicts_with('class_weight', model):
        weights = loss['class_weight']
        # heads that predict masks have one weight more, for "no object"
        if isinstance(weights, (list, tuple)) and len(weights) - num_classes not in (0, 1):
            raise DataRootError(
                f'a loss of the model has {len(weights)} weights in class_weight, but '
                f'{CLASSES_FILE} names {num_classes} classes: set others, or none with '
                '--cfg-options, e.g. model.decode_head.loss_decode.class_weight=None')


def _check(dataset: dict, root: Path) -> None:
    """What the data set would read, by asking the data set itself."""
    from mmseg.registry import DATASETS

    # lazy: without images it would fail with no word about them; the scope: mmdet has a
    # data set of the same name
    built = DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': True, '_scope_': 'mmseg'})
    for path in (*built.data_prefix.values(), built.ann_file):
        if path and not Path(path).exists():
            raise DataRootError(f'{path} is missing; {root} holds '
                                f'{sorted(p.name for p in root.iterdir()) or "nothing"}')
    samples = built.load_data_list()
    if not samples:
        raise DataRootError(f'{built.data_prefix["img_path"]} holds no images: the config looks '
                            f'for <city>/*{built.img_suffix} there')
    labels = [Path(sample['seg_map_path']) for sample in samples]
    missing = [i for i, label in enumerate(labels) if not label.is_file()]
    if missing:
        image, label = samples[missing[0]]['img_path'], labels[missing[0]]
        raise DataRootError(f'{image} has no label file: {label} is missing (as are those of '
                            f'{len(missing)} of {len(samples)} images in all){_raw_ids(label)}')
    if not built.metainfo.get('classes'):
        raise DataRootError(f'{root / CLASSES_FILE} is missing, and the config names no classes')
    num_classes = num_label_values(built)
    for i in spread(len(labels), _SAMPLE):
        _check_values(labels[i], num_classes, built.ignore_index)


def num_label_values(dataset: BaseDataset) -> int:
    """How many values may stand for a class in a label file, from 0.

    Args:
        dataset: A data set of mmseg, whose class names are known.
    """
    # with a label map, the files hold the ids of the classes before it
    num_classes = len(dataset.label_map or dataset.metainfo['classes'])
    return num_classes + bool(dataset.reduce_zero_label)  # then 0 is no class, but may be there


def read_label_map(label: Path) -> np.ndarray:
    """The values of a label file, as mmseg reads it.

    Args:
        label: The file.

    Returns:
        Values `(height, width)`; of a colour image, `(height, width, channels)`.

    Raises:
        OSError, SyntaxError: If it cannot be read.
    """
    # Pillow keeps the indices of an image with a palette
    return mmcv.imread(label, flag='unchanged', backend='pillow').squeeze()


def illegal_values(values: np.ndarray, num_classes: int, ignore_index: int) -> list[int]:
    """Label values that stand for no class.

    Args:
        values: From `read_label_map`.
        num_classes: From `num_label_values`.
        ignore_index: The value of pixels that do not count.

    Returns:
        Each once, sorted.
    """
    return sorted(set(np.unique(values).tolist()) - {*range(num_classes), ignore_index})


def _raw_ids(label: Path) -> str:
    raw = label.with_name(label.name.replace('_labelTrainIds', '_labelIds'))
    if raw == label or not raw.is_file():
        return ''
    return (f'. {raw.name} is there, but holds the raw ids: the script '
            'tools/dataset_converters/cityscapes.py of mmseg (it needs cityscapesscripts) '
            'makes the train ids from the polygons of Cityscapes')


def _check_values(label: Path, num_classes: int, ignore_index: int) -> None:
    try:
        values = read_label_map(label)
    except (OSError, SyntaxError) as error:
        raise DataRootError(f'{label} cannot be read: {error}') from error
    if values.ndim != 2:
        raise DataRootError(f'{label} is a colour image; a label file has one channel, with the '
                            "number of each pixel's class")
    illegal = illegal_values(values, num_classes, ignore_index)
    if illegal:
        raise DataRootError(
            f'{label} has the value {illegal[0]}: with {num_classes} classes the values are 0 to '
            f'{num_classes - 1}, and {ignore_index} for pixels that do not count. Other classes '
            f'than those of the config are named in a file {CLASSES_FILE}')
