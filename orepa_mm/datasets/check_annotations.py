"""What is wrong with an annotation file in COCO format, without a look at the images."""

from __future__ import annotations

import collections
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from ..errors import DataRootError, shortened
from .check_findings import Findings
from .config_walk import SPLITS, dicts_with, find_datasets

#: Pixels by which boxes may reach out of an image: annotation tools round.
TOLERANCE = 1.0
#: Problems that are named before a run is refused.
_FIRST = 3


def require_usable_data(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Refuse annotations that make results wrong without a word: the quick part of the check.

    Reads the annotation files in COCO format that data sets and evaluators
    name, no images. NaN boxes among those to test on even raise AP. Files that
    are not there, or of another format, are left to whoever reads them.

    Args:
        cfg: Any config.
        splits: The data that will be read, of `train`, `val` and `test`.

    Raises:
        DataRootError: If a box is no box, NaN, infinite or of negative size, a
            category is unknown, or an id is missing or used twice.
    """
    problems = []
    for path, used in _annotation_files(cfg, splits).items():
        content = read_coco(path)
        if content is not None and has_boxes(content):
            findings = Findings(str(path), used)
            check_silent(content, findings)
            problems += findings.found()
    if problems:
        lines = [f'  {found.data}: {found.problem}, {len(found.names)} in all: '
                 f'{shortened(found.names[:_FIRST])}' for found in problems]
        raise DataRootError(
            'these annotations would make results wrong:\n' + '\n'.join(lines) + '\nMend or remove '
            'them; all problems of the data are listed by\n  mim run orepa_mm check_data CONFIG '
            '--data-root DIR')


def read_coco(path: Path) -> dict[str, Any] | None:
    """Read an annotation file.

    Args:
        path: A JSON file.

    Returns:
        Its content; None if it is not in COCO format: a dictionary whose
        `images`, `annotations` and `categories` are lists of dictionaries.

    Raises:
        DataRootError: If it is no JSON, or an id in it is a list or dictionary.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise DataRootError(f'{path} is no JSON file: {error}') from error
    lists = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or not all(
            isinstance(content.get(name), list)
            and all(isinstance(item, dict) for item in content[name]) for name in lists):
        return None
    for name in lists:
        for key in ('id', 'image_id', 'category_id'):
            if not all(isinstance(item.get(key), Hashable) for item in content[name]):
                raise DataRootError(f'{path}: {key} in {name} must be a number')
    return content


def has_boxes(content: dict[str, Any]) -> bool:
    """Whether an annotation file is for detection; captions and panoptic labels have no boxes.

    Args:
        content: From `read_coco`.
    """
    annotations = content['annotations']
    return not annotations or any('bbox' in annotation for annotation in annotations)


def check_silent(content: dict[str, Any], findings: Findings) -> None:
    """Find what mmdet and pycocotools take without a word, and what makes results wrong.

    Args:
        content: From `read_coco`.
        findings: Problems are added here.
    """
    for kind, items in (('image', content['images']), ('annotation', content['annotations']),
                        ('category', content['categories'])):
        ids = [item.get('id') for item in items]
        if len({*ids} - {None}) < len(ids):
            counts = collections.Counter(ids)
            findings.add('entry without an id', [f'{kind} {i}' for i, key in enumerate(ids)
                                                 if key is None])
            findings.add(f'{kind} id used twice', [f'{kind} {key}' for key, count in counts.items()
                                                   if count > 1 and key is not None])
    annotations, name = content['annotations'], _Namer(content)
    known = {category.get('id') for category in content['categories']}
    findings.add('category id is not in the file', [
        f'{name(annotation)}: {annotation.get("category_id")}' for annotation in annotations
        if annotation.get('category_id') not in known])
    boxes, broken = _boxes(annotations)
    findings.add('box is not four numbers', [name(annotations[i]) for i in broken])
    finite = np.isfinite(boxes).all(axis=1)
    finite[broken] = True  # named already
    _add_boxes('box is NaN or infinite', ~finite, annotations, name, findings)
    with np.errstate(invalid='ignore'):
        _add_boxes('box of negative size', finite & (boxes[:, 2:] < 0).any(axis=1), annotations,
                   name, findings)


def check_coco(content: dict[str, Any], findings: Findings,
               masks: bool = False) -> dict[Any, tuple[float, float]]:
    """Find everything that is wrong with annotations, but for the images.

    Args:
        content: From `read_coco`.
        findings: Problems are added here.
        masks: Whether the masks are used.

    Returns:
        Width and height in pixels of the images, by id, where the file says them.
    """
    check_silent(content, findings)
    annotations, name = content['annotations'], _Namer(content)
    sizes = {}
    for i, image in enumerate(content['images']):
        size = (image.get('width'), image.get('height'))
        if has_file_name(image) and all(map(_is_number, size)):
            sizes[image.get('id')] = size
        else:
            findings.add('image without file name, width or height',
                         str(image.get('file_name') or f'image {image.get("id", i)}'))
    known = {image.get('id') for image in content['images']}
    findings.add('annotation of an image that is not in the file', [
        f'annotation {annotation.get("id")} (image {annotation.get("image_id")})'
        for annotation in annotations if annotation.get('image_id') not in known])
    labelled = {annotation.get('image_id') for annotation in annotations}
    if not known & labelled:
        findings.add('no labels at all', findings.data)
    else:
        findings.add('image without labels', [
            str(image.get('file_name')) for image in content['images']
            if image.get('id') not in labelled])
    _check_places(annotations, sizes, name, findings)
    _check_areas(annotations, name, findings)
    if masks:
        for annotation in annotations:
            problem = _mask_problem(annotation, sizes.get(annotation.get('image_id')))
            if problem:
                findings.add(problem, name(annotation))
    return sizes


def _annotation_files(cfg: Config, splits: Sequence[str]) -> dict[Path, set[str]]:
    """The annotation files that are there, and what they are used for."""
    files: dict[Path, set[str]] = {}
    for split in splits:
        named = [Path(dataset.get('data_root') or '', str(dataset['ann_file']))
                 for dataset in find_datasets(cfg, [split]) if dataset.get('ann_file')]
        named += [Path(str(evaluator['ann_file']))
                  for evaluator in dicts_with('ann_file', cfg.get(f'{split}_evaluator'))]
        for path in named:
            if path.suffix == '.json' and path.is_file():
                files.setdefault(path.resolve(), set()).add(split)
    return files


class _Namer:
    """Names an annotation by its id and its image's file."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._images = content['images']
        self._files: dict[Any, Any] | None = None

    def __call__(self, annotation: dict[str, Any]) -> str:
        if self._files is None:  # most files have nothing to name
            self._files = {image.get('id'): image.get('file_name') for image in self._images}
        file = self._files.get(annotation.get('image_id'), 'no image')
        return f'annotation {annotation.get("id")} ({file})'


def has_file_name(image: dict[str, Any]) -> bool:
    """Whether an entry of an image names its file.

    Args:
        image: Of an annotation file.
    """
    return isinstance(image.get('file_name'), str) and bool(image['file_name'])


def _is_number(value: object) -> bool:
    # no float holds an integer that is larger, and NumPy none beyond 64 bits
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53)


def _boxes(annotations: list[dict[str, Any]]) -> tuple[np.ndarray, list[int]]:
    """Boxes x, y, width, height `(n, 4)` in pixels; which are none (NaN in the array)."""
    boxes = [annotation.get('bbox') for annotation in annotations]
    try:
        return np.array(boxes, dtype=float).reshape(len(boxes), 4), []
    except (ValueError, TypeError, OverflowError):
        pass  # one of them is no box: find out which
    array, broken = np.full((len(boxes), 4), np.nan), []
    for i, box in enumerate(boxes):
        if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
            array[i] = box
        else:
            broken.append(i)
    return array, broken


def _add_boxes(problem: str, mask: np.ndarray, annotations: list[dict[str, Any]], name: _Namer,
               findings: Findings) -> None:
    findings.add(problem, [f'{name(annotations[i])}: {annotations[i].get("bbox")}'
                           for i in np.flatnonzero(mask)])


def _check_places(annotations: list[dict[str, Any]], sizes: dict[Any, tuple], name: _Namer,
                  findings: Findings) -> None:
    """Where boxes lie, of those that are boxes and belong to an image of known size."""
    boxes, _ = _boxes(annotations)
    images = np.array([sizes.get(annotation.get('image_id'), (np.nan, np.nan))
                       for annotation in annotations], dtype=float).reshape(-1, 2)
    sound = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid='ignore'):
        sound &= (boxes[:, 2:] >= 0).all(axis=1)
        corners = boxes[:, :2] + boxes[:, 2:]
        flat = sound & (boxes[:, 2:] == 0).any(axis=1)
        outside = sound & ~flat & ((corners <= 0) | (boxes[:, :2] >= images)).any(axis=1)
        reaching = sound & ~flat & ~outside & (
            (boxes[:, :2] < -TOLERANCE) | (corners > images + TOLERANCE)).any(axis=1)
    for problem, mask in (('box of no area', flat), ('box outside of the image', outside),
                          ('box reaches out of the image', reaching)):
        _add_boxes(problem, mask, annotations, name, findings)


def _check_areas(annotations: list[dict[str, Any]], name: _Namer, findings: Findings) -> None:
    for annotation in annotations:
        area = annotation.get('area')
        if not _is_number(area):
            findings.add('area is missing', name(annotation))
        elif not area > 0:  # NaN neither
            findings.add('area is not positive', f'{name(annotation)}: {area}')
        if 'iscrowd' not in annotation:
            findings.add('iscrowd is missing', name(annotation))


def _mask_problem(annotation: dict[str, Any], size: tuple | None) -> str | None:
    """What is wrong with polygons or run lengths; `size` is width and height of the image."""
    mask = annotation.get('segmentation')
    if not mask:
        return 'mask is missing'
    if isinstance(mask, dict):
        fits = bool(mask.get('counts')) and (size is None or mask.get('size') == [*size[::-1]])
        return None if fits else 'mask is broken'
    sound = isinstance(mask, list) and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        and all(_is_number(value) and np.isfinite(value) for value in polygon) for polygon in mask)
    return None if sound else 'mask is broken'
