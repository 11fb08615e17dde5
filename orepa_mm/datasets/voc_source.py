"""Folders in Pascal VOC format: `JPEGImages/`, `Annotations/*.xml`, `ImageSets/Main/train.txt`."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

from ..errors import DataRootError
from .check_findings import Findings
from .cityscapes_layout import CLASSES_FILE
from .sources import IMAGE_SUFFIXES, Item, Label, Source, read_lines, require_different

_FOLDERS = ('JPEGImages', 'Annotations')
_LISTS = Path('ImageSets', 'Main')
#: The lists that stand for a split, the first that is there.
_NAMES = {'train': ('train', 'trainval'), 'val': ('val', 'test'), 'test': ('test', 'val'),
          'trainval': ('trainval',)}
#: What an object may say of itself.
_FLAGS = ('difficult', 'truncated', 'occluded')


def is_voc(root: Path) -> bool:
    """Whether a folder looks like one in Pascal VOC format; it may be incomplete.

    Args:
        root: The folder.
    """
    # by their very names: where case does not count, COCO's `annotations` is another folder
    return any(path.name in _FOLDERS and path.is_dir() for path in root.iterdir())


def read_voc(root: Path, splits: Collection[str]) -> Source:
    """Find the files of a folder in Pascal VOC format; labels are not read yet.

    Corners of boxes count from 1 and belong to the box. Objects that are
    `difficult` are marked `iscrowd`: neither training nor the metric counts them.

    Args:
        root: The folder.
        splits: What is to be read: the names of lists. Where there is no
            `val.txt`, `test.txt` stands for it, and `trainval.txt` for a
            missing `train.txt`.

    Raises:
        DataRootError: If a folder is missing, or `classes.txt` does not tell classes apart.
    """
    missing = [str(name) for name in (*_FOLDERS, _LISTS) if not (root / name).is_dir()]
    if missing:
        raise DataRootError(f'{root} looks like Pascal VOC format, but lacks {", ".join(missing)}: '
                            'it needs JPEGImages with images, Annotations with their XML files, '
                            'and ImageSets/Main with the lists train.txt and val.txt')
    classes, settings = None, []
    if (root / CLASSES_FILE).is_file():
        settings.append(root / CLASSES_FILE)
        classes = require_different(tuple(read_lines(settings[0])), settings[0])
    # all suffixes at once: a search for each image would list the folder as often
    images = {path.stem: path for path in sorted((root / 'JPEGImages').iterdir(), reverse=True)
              if path.suffix.lower() in IMAGE_SUFFIXES}
    found: dict[str, list[Item] | DataRootError] = {}
    for split in splits:
        try:
            path = _list_of(root, split)
            settings.append(path)
            found[split] = _items(root, path, images)
        except DataRootError as error:
            found[split] = error
    return Source('Pascal VOC', classes, found, settings,
                  functools.partial(_read, classes=classes))


def _list_of(root: Path, split: str) -> Path:
    folder = root / _LISTS
    names = _NAMES[split]
    if split == 'train' and (folder / 'val.txt').is_file():
        names = names[:1]  # trainval has the images of val, too
    paths = [folder / f'{name}.txt' for name in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        there = ', '.join(sorted(file.name for file in folder.glob('*.txt'))[:10]) or 'no lists'
        raise DataRootError(f'{paths[0]} is missing; {folder} holds {there}')
    return path


def _items(root: Path, path: Path, images: dict[str, Path]) -> list[Item]:
    items = []
    for line in read_lines(path):
        name, _, flag = line.rpartition(' ')  # the lists of a class end with 1, 0 or -1
        if line not in images and name and flag in ('1', '0', '-1'):
            line = name.strip()
        image = images.get(line, root / 'JPEGImages' / f'{line}.jpg')
        items.append(Item(image, root / 'Annotations' / f'{line}.xml'))
    if not items:
        raise DataRootError(f'{path} lists no images')
    if not any(item.labels.is_file() for item in items):
        raise DataRootError(f'none of the {len(items)} images of {path} has a label file: that of '
                            f'{items[0].image.name} was looked for in {items[0].labels}')
    return items


def _read(item: Item, size: tuple[int, int], findings: Findings,
          classes: tuple[str, ...] | None) -> list[Label] | None:
    if not item.labels.is_file():
        findings.add('label file is missing, image left out', str(item.labels))
        return None
    try:
        root = ElementTree.parse(item.labels).getroot()
    except ElementTree.ParseError as error:
        findings.add('label file cannot be read, image left out', f'{item.labels}: {error}')
        return None
    stated = tuple(_number(root.find('size'), name) for name in ('width', 'height'))
    if stated != size and min(stated) > 0:  # some tools write 0, or no size
        findings.add('size in the label file differs from that of the image',
                     f'{item.labels}: {stated[0]:g} x {stated[1]:g}, not {size[0]} x {size[1]}')
    labels = []
    for number, entry in enumerate(root.findall('object'), start=1):
        category = (entry.findtext('name') or '').strip()
        place = f'{item.labels}: object {number} ({category or "no name"})'
        left, top, right, bottom = corners = [
            _number(entry.find('bndbox'), name) for name in ('xmin', 'ymin', 'xmax', 'ymax')]
        if not category or not all(map(math.isfinite, corners)):
            findings.add('label cannot be read, left out', place)
            continue
        if classes is not None and category not in classes:
            findings.add('label of an unknown class, left out', place)
            continue
        flags = {name: 1 for name in _FLAGS if _number(entry, name) > 0}
        if 'difficult' in flags:
            findings.add('difficult object, counted neither in training nor in the metric', place)
            flags['iscrowd'] = 1
        if min(left, top) < 1:
            findings.add('box begins before the first pixel, which is 1', place)
        labels.append(Label(place, category,
                            (left - 1, top - 1, right - left + 1, bottom - top + 1), more=flags))
    return labels


def _number(parent: ElementTree.Element | None, name: str) -> float:
    """The value of an entry; NaN where there is none."""
    try:
        return float((parent.findtext(name) if parent is not None else None) or 'nan')
    except ValueError:
        return math.nan
