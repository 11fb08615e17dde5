"""Folders in YOLO format, as Ultralytics lays them out: `data.yaml`, `images/`, `labels/`."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataRootError
from .check_findings import Findings
from .sources import IMAGE_SUFFIXES, Item, Label, Source, read_lines, require_different

_NEEDED = ('data.yaml with train, val and names (and path, where the images are elsewhere)')


def is_yolo(root: Path) -> bool:
    """Whether a folder looks like one in YOLO format; it may be incomplete.

    Args:
        root: The folder.
    """
    return bool(_data_files(root)) or all((root / name).is_dir() for name in ('images', 'labels'))


def read_yolo(root: Path, splits: Collection[str]) -> Source:
    """Find the files of a folder in YOLO format; labels are not read yet.

    `train`, `val` and `test` of `data.yaml` are each a folder of images, a text
    file that lists images, or a list of these. The labels of
    `images/train/a.jpg` are in `labels/train/a.txt`, those of an image with no
    folder `images` above it are beside it. A line is a class, counted from 0,
    and a box (centre, width, height) or an outline (corners), in parts of the
    image's width and height.

    Args:
        root: The folder.
        splits: What is to be read, of the names that the file may use. `test`
            is `val` where the file has none.

    Raises:
        DataRootError: If there is no such file, there are several, or it names no classes.
    """
    files = _data_files(root)
    if len(files) != 1:
        found = ', '.join(path.name for path in files) or 'none'
        raise DataRootError(f'{root} looks like YOLO format, which needs one file {_NEEDED}; such '
                            f'files there: {found}')
    content, lists = _content(files[0]), [files[0]]
    classes = _classes(content, files[0])
    keypoints = _num_keypoint_values(content, files[0])
    found: dict[str, list[Item] | DataRootError] = {}
    for split in splits:
        try:
            key = 'val' if split == 'test' and not content.get('test') else split
            found[split] = _items(root, content, key, files[0], lists)
        except DataRootError as error:
            found[split] = error
    return Source('YOLO', classes, found, lists,
                  functools.partial(_read, classes=classes, num_keypoint_values=keypoints))


def label_file(image: Path) -> Path:
    """Where the labels of an image are.

    Args:
        image: Its file, with the folders that its labels are found by.
    """
    parts = [*image.parts]
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == 'images':
            parts[i] = 'labels'
            break
    return Path(*parts).with_suffix('.txt')


def _content(path: Path) -> Any:
    try:
        # the base loader takes all for text: a class may be named `no` or `1`
        return yaml.load(path.read_text(encoding='utf-8-sig'), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataRootError(f'{path} is no YAML file: {error}') from error


def _data_files(root: Path) -> list[Path]:
    """The files directly in a folder that say where images are and what the classes are."""
    found = []
    for path in sorted(root.iterdir()):
        if path.suffix not in ('.yaml', '.yml') or not path.is_file():
            continue
        try:
            content = _content(path)
        except DataRootError:
            content = None
        is_data = isinstance(content, dict) and {'names', 'nc'} & {*content} and (
            {'train', 'val', 'test'} & {*content})
        if is_data or path.stem == 'data':  # whose faults are to be named
            found.append(path)
    return found


def _classes(content: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(content, dict):
        raise DataRootError(f'{path} holds no settings: it needs {_NEEDED}')
    names, number = content.get('names'), content.get('nc')
    if not names and str(number).isdecimal():
        names = [f'class_{i}' for i in range(int(number))]
    if isinstance(names, dict):
        keys = [str(i) for i in range(len(names))]
        if {*names} != {*keys}:
            raise DataRootError(f'{path}: names must be numbered from 0 to {len(names) - 1}, not '
                                f'{", ".join(names)}')
        names = [names[key] for key in keys]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataRootError(f'{path}: names must list the classes, has {names}')
    if number and number != str(len(names)):
        raise DataRootError(f'{path}: nc is {number}, but names has {len(names)} classes')
    return require_different(tuple(names), path)


def _num_keypoint_values(content: dict, path: Path) -> int:
    shape = content.get('kpt_shape') or ['0']
    try:
        return math.prod(map(int, shape))
    except (ValueError, TypeError) as error:
        raise DataRootError(f'{path}: kpt_shape must be two numbers, has {shape}') from error


def _items(root: Path, content: dict, split: str, path: Path, lists: list[Path]) -> list[Item]:
    """The images of a split; adds the files that list them to `lists`."""
    value = content.get(split)
    if not value:
        raise DataRootError(f'{path} names no images for {split}: it needs {_NEEDED}')
    home = root / content.get('path', '')
    home = home if home.is_dir() else root  # the path of another machine
    items = []
    for entry in value if isinstance(value, list) else [value]:
        # exporters write ../train/images where they mean train/images
        places = [_normal(base / name) for base in dict.fromkeys((home, root))
                  for name in (entry, entry.removeprefix('../'))]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise DataRootError(f'{path} names {entry} for {split}, which is missing; looked for '
                                f'{" and ".join(map(str, dict.fromkeys(places)))}')
        if place.is_dir():
            images = [image for image in sorted(place.rglob('*'))
                      if image.suffix.lower() in IMAGE_SUFFIXES and image.name[0] != '.']
        else:
            lists.append(place)
            images = [_listed(line, place.parent, home) for line in read_lines(place)]
        if not images:
            raise DataRootError(f'{place}, which {path} names for {split}, holds no images')
        items += [Item(image, label_file(image)) for image in images]
    if not any(item.labels.is_file() for item in items):
        raise DataRootError(f'none of the {len(items)} images for {split} has a label file: those '
                            f'of {items[0].image} were looked for in {items[0].labels}')
    return items


def _listed(line: str, folder: Path, home: Path) -> Path:
    """An image that a list names: from the list's folder, or from that of the data set."""
    paths = [_normal(base / line) for base in (folder, home)]
    return next((path for path in paths if path.is_file()), paths[0])


def _normal(path: Path) -> Path:
    """Without `..`, and with links as they are: labels are found by the folders' names."""
    return Path(os.path.abspath(path))


def _read(item: Item, size: tuple[int, int], findings: Findings, classes: tuple[str, ...],
          num_keypoint_values: int) -> list[Label]:
    if not item.labels.is_file():
        findings.add('image without a label file', str(item.image))
        return []
    labels = []
    for row in read_lines(item.labels):
        place = f'{item.labels}: {row if len(row) < 60 else row[:57] + "..."}'
        try:
            category, *values = map(float, row.split())
            index = int(category)
        except (ValueError, OverflowError):
            index, category, values = 0, math.nan, []
        if num_keypoint_values and len(values) == 4 + num_keypoint_values:
            findings.add('keypoints are not used', place)
            values = values[:4]
        is_outline = len(values) >= 6 and len(values) % 2 == 0
        if index != category or not (len(values) == 4 or is_outline) or not all(
                map(math.isfinite, values)):
            findings.add('label cannot be read, left out', place)
        elif not 0 <= index < len(classes):
            findings.add('label of an unknown class, left out', place)
        else:
            labels.append(_label(place, classes[index], values, size))
    return labels


def _label(place: str, category: str, values: list[float], size: tuple[int, int]) -> Label:
    pixels = [value * size[i % 2] for i, value in enumerate(values)]
    if len(values) == 4:
        x, y, width, height = pixels
        return Label(place, category, (x - width / 2, y - height / 2, width, height))
    x, y = pixels[::2], pixels[1::2]
    return Label(place, category, (min(x), min(y), max(x) - min(x), max(y) - min(y)),
                 tuple(pixels))
