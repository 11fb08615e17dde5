"""Annotations in other formats, written once as COCO's into the user's cache; images stay there."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from mmengine.logging import print_log
from rich.console import Console

from ..errors import DataRootError
from ..files import folder_written_whole, require_writable_folder
from .check_annotations import TOLERANCE
from .check_findings import Findings, problem_table
from .sources import Item, Label, Source, image_size

#: What was converted and what was left out, beside the annotations.
REPORT = 'conversion.json'
#: Of what is written; another number makes every folder be converted anew.
_VERSION = 1
#: Characters of a line of the table in the log.
_WIDTH = 120


def converted(root: Path, source: Source, files: Mapping[str, str], image_folders: Collection[str],
              needed: Collection[str]) -> Path:
    """A folder in COCO layout for one in another format, from the cache or written now.

    It holds annotation files that name the original images by their whole
    paths, and `conversion.json`. It is made anew when a file of the source is
    another one, by its size and the time of its last change; the earlier one
    stays for runs that use it. Processes that start together wait for the one
    that converts. What was changed or left out is logged.

    Args:
        root: The folder.
        source: What is in it.
        files: The annotation files to write, relative paths, and the split of each.
        image_folders: Folders that there must be; they stay empty.
        needed: The splits without which there is nothing to do; others may be missing.

    Returns:
        The folder in the cache.

    Raises:
        DataRootError: If a split that is needed cannot be converted, or the cache not be written.
    """
    cache = cache_folder()
    fingerprint = _fingerprint(root, source, files, image_folders)
    folder = cache / f'{root.name[:40]}-{fingerprint[:16]}'
    if not (folder / REPORT).is_file():
        try:
            require_writable_folder(cache)
        except OSError as error:
            raise DataRootError(
                f'{root} is in {source.format} format and must be converted once, but the cache '
                f'{cache} cannot be written ({error}): set XDG_CACHE_HOME to another folder'
            ) from error
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / '.lock'):
            if not (folder / REPORT).is_file():  # another process did it meanwhile
                _write(root, source, files, image_folders, folder)
    report = json.loads((folder / REPORT).read_text(encoding='utf-8'))
    for split in needed:
        if split in report['not_converted']:
            raise DataRootError(report['not_converted'][split])
    if os.environ.get('RANK', '0') == '0':  # of a distributed run that is to begin
        print_log(_described(report, folder), 'current')
    return folder


def cache_folder() -> Path:
    """Where converted annotations are kept.

    Raises:
        DataRootError: If the user has no home, and XDG_CACHE_HOME is not set.
    """
    try:
        caches = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    except RuntimeError as error:
        raise DataRootError('there is no place for converted annotations, as there is no home: '
                            'set XDG_CACHE_HOME to a folder') from error
    return Path(caches).absolute() / 'orepa_mm' / 'datasets'


def conversion_of(root: str | Path | None, annotation: Path) -> dict[str, Any]:
    """What `conversion.json` says of an annotation file.

    Args:
        root: The folder that a data set reads from.
        annotation: The file.

    Returns:
        `split`, `images`, `labels`, `outlines` (counts), and `problems`, the
        names of what has each; nothing if the file was not converted.
    """
    path = Path(root or '', REPORT)
    if not path.is_file() or not annotation.is_relative_to(path.parent):
        return {}
    content = json.loads(path.read_text(encoding='utf-8'))
    return content.get('files', {}).get(annotation.relative_to(path.parent).as_posix(), {})


def _fingerprint(root: Path, source: Source, files: Mapping[str, str],
                 image_folders: Collection[str]) -> str:
    """Of everything that the result depends on; of images and labels size and time."""
    digest = hashlib.sha256(repr((
        _VERSION, source.format, str(root), sorted(files.items()), sorted(image_folders),
        source.classes)).encode())
    for path in source.settings:
        digest.update(path.read_bytes())
    for split, items in sorted(source.splits.items()):
        digest.update(repr((split, str(items) if isinstance(items, DataRootError) else [
            (str(path), _state(path)) for item in items for path in (item.image, item.labels)]
        )).encode())
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _write(root: Path, source: Source, files: Mapping[str, str], image_folders: Collection[str],
           folder: Path) -> None:
    print_log(f'converting {root} from {source.format} format', 'current')
    parts, failed = {}, {}
    for file, split in files.items():
        items = source.splits[split]
        try:
            if isinstance(items, DataRootError):
                raise items
            parts[file] = _read(source, split, items)
        except DataRootError as error:
            failed[split] = str(error)
    classes = source.classes or tuple(sorted({
        label.category for read, _ in parts.values() for _, _, labels in read for label in labels}))
    report = {'source': str(root), 'format': source.format, 'classes': classes, 'files': {},
              'not_converted': failed}
    with folder_written_whole(folder, lambda name: True) as temporary:
        for name in image_folders:
            (temporary / name).mkdir(parents=True, exist_ok=True)
        for file, (read, findings) in parts.items():
            content = _coco(read, classes)
            report['files'][file] = {
                'split': files[file], 'images': len(read), 'labels': len(content['annotations']),
                'outlines': sum('segmentation' in entry for entry in content['annotations']),
                'problems': {finding.problem: finding.names for finding in findings.found()}}
            content['info'] = {'description': f'converted from {source.format} format: {root}'}
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            (temporary / file).write_text(json.dumps(content), encoding='utf-8')
        (temporary / REPORT).write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


#: An image, its width and height in pixels, and its objects.
_Read = tuple[Path, tuple[int, int], list[Label]]


def _read(source: Source, split: str, items: list[Item]) -> tuple[list[_Read], Findings]:
    """All of a split that can be used, and what is wrong with it."""
    findings, read, seen = Findings(split, [split]), [], set()
    for item in items:
        if item.image in seen:
            findings.add('image listed twice, left out once', str(item.image))
            continue
        seen.add(item.image)
        if not item.image.is_file():
            findings.add('image file is missing, left out', str(item.image))
            continue
        size = image_size(item.image)
        if size is None:
            findings.add('image cannot be read, left out', str(item.image))
            continue
        labels = source.read(item, size, findings)
        if labels is None:
            continue
        if not labels and item.labels.is_file():
            findings.add('image without labels', str(item.image))
        read.append((item.image, size, _usable(labels, size, findings)))
    lost = [finding for finding in findings.found() if finding.problem.endswith('left out')]
    if lost and not any(labels for *_, labels in read):
        problems = '; '.join(f'{finding.problem}: {len(finding.names)}, first {finding.names[0]}'
                             for finding in lost)
        raise DataRootError(f'not one label for {split} can be used: {problems}')
    return read, findings


def _usable(labels: list[Label], size: tuple[int, int], findings: Findings) -> list[Label]:
    """The objects that have an area in the image, each once."""
    kept, seen = [], set()
    for label in labels:
        x, y, width, height = label.box
        identity = (label.category, label.box, label.polygon)
        if not (width > 0 and height > 0 and label.area > 0):
            findings.add('box of no area, left out', label.place)
        elif x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
            findings.add('box outside of the image, left out', label.place)
        elif identity in seen:
            findings.add('label given twice, left out once', label.place)
        else:
            seen.add(identity)
            kept.append(label)
            if min(x, y, size[0] - x - width, size[1] - y - height) < -TOLERANCE:
                findings.add('box reaches out of the image', label.place)
    return kept


def _coco(read: list[_Read], classes: tuple[str, ...]) -> dict[str, Any]:
    numbers, annotations = itertools.count(1), []
    for i, (_, _, labels) in enumerate(read, start=1):
        for label in labels:
            entry = {'id': next(numbers), 'image_id': i,
                     'category_id': classes.index(label.category) + 1, 'bbox': label.box,
                     'area': label.area, 'iscrowd': 0, **label.more}
            if label.polygon:
                entry['segmentation'] = [label.polygon]
            annotations.append(entry)
    return {
        'images': [{'id': i, 'file_name': str(image), 'width': size[0], 'height': size[1]}
                   for i, (image, size, _) in enumerate(read, start=1)],
        'annotations': annotations,
        'categories': [{'id': i, 'name': name} for i, name in enumerate(classes, start=1)]}


def _described(report: dict[str, Any], folder: Path) -> str:
    """What was converted, with a table of what is worth knowing."""
    lines = [f'{report["source"]} is in {report["format"]} format; its annotations in COCO format '
             f'are in {folder}']
    for content in report['files'].values():
        lines.append(f'{content["split"]}: {content["images"]} images, {content["labels"]} labels')
        findings = Findings(content['split'], [content['split']])
        for problem, names in content['problems'].items():
            findings.add(problem, names)
        if content['problems']:
            with (console := Console(file=io.StringIO(), width=_WIDTH)).capture() as table:
                console.print(problem_table(findings.found(), report['source']))
            lines += [line.rstrip() for line in table.get().splitlines() if line.strip()]
    lines += [f'{split} was not converted: {reason}'
              for split, reason in report['not_converted'].items()]
    return '\n'.join(lines)
