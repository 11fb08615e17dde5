"""What is wrong with image and label files, read as the pipelines read them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import mmcv
from PIL import UnidentifiedImageError

from ..files import sha256
from .check_findings import Findings
from .cityscapes_layout import illegal_values, read_label_map


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        image: Its file.
        size: Width and height in pixels that the annotation file says; None: it says nothing.
        label: Its label map; None: the data set has none.
    """

    image: Path
    size: tuple[float, float] | None = None
    label: Path | None = None


def check_files(samples: Sequence[Sample], findings: Findings) -> list[Sample]:
    """Find files that are missing or empty; none is opened.

    Args:
        samples: Images of a data set.
        findings: Problems are added here.

    Returns:
        The samples whose files can be opened.
    """
    if not samples:
        findings.add('no images', findings.data)
    sound = []
    for sample in samples:
        files = [('image file', sample.image), ('label map', sample.label)]
        problems = [(f'{kind} is missing' if not path.is_file() else f'{kind} is empty', path)
                    for kind, path in files
                    if path is not None and (not path.is_file() or not path.stat().st_size)]
        for problem, path in problems:
            findings.add(problem, str(path))
        if not problems:
            sound.append(sample)
    return sound


def check_image(sample: Sample, findings: Findings) -> tuple[int, int] | None:
    """Decode an image as the pipelines do.

    Args:
        sample: Its file is there.
        findings: Problems are added here.

    Returns:
        Its width and height in pixels; None if it cannot be read.
    """
    content = sample.image.read_bytes()
    try:
        image = mmcv.imfrombytes(content, flag='color')
    except cv2.error:
        image = None
    if image is None:
        findings.add('image cannot be read', str(sample.image))
        return None
    if _is_cut(content):
        findings.add('image is cut off', str(sample.image))
    size = (image.shape[1], image.shape[0])
    if sample.size is not None and sample.size != size:
        width, height = sample.size
        findings.add('size differs from that in the annotation file',
                     f'{sample.image}: {size[0]} x {size[1]}, not {width} x {height}')
    return size


def check_label_map(label: Path, size: tuple[int, int] | None, num_values: int, ignore_index: int,
                    findings: Findings) -> None:
    """Read a label map as mmseg does.

    Args:
        label: Its file, which is there.
        size: Width and height of the image in pixels; None: unknown.
        num_values: See `num_label_values`.
        ignore_index: The value of pixels that do not count.
        findings: Problems are added here.
    """
    try:
        values = read_label_map(label)
    except (OSError, SyntaxError):
        findings.add('label map cannot be read', str(label))
        return
    if values.ndim != 2:
        findings.add('label map is a colour image', str(label))
        return
    if size is not None and values.shape != size[::-1]:
        findings.add('label map of another size than the image',
                     f'{label}: {values.shape[1]} x {values.shape[0]}, not {size[0]} x {size[1]}')
    illegal = illegal_values(values, num_values, ignore_index)
    if illegal:
        findings.add('label value out of range', f'{label}: {illegal[0]}')
    elif (values == ignore_index).all():
        findings.add('image without labels', str(label))


def same_content(first: Iterable[Path], second: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Files of two sets that hold the same.

    Only files whose size occurs in both sets are read.

    Args:
        first: Files of one set.
        second: Files of the other.

    Returns:
        Pairs: a file of the second set, with the first one of the first set that is the same.
    """
    sizes = [collections.defaultdict(list), collections.defaultdict(list)]
    for by_size, paths in zip(sizes, (first, second), strict=True):
        for path in paths:
            by_size[path.stat().st_size].append(path)
    pairs = []
    for size in sorted(sizes[0].keys() & sizes[1].keys()):
        known: dict[str, Path] = {}
        for path in sizes[0][size]:
            known.setdefault(sha256(path), path)
        pairs += [(known[digest], path) for path in sizes[1][size]
                  if (digest := sha256(path)) in known]
    return pairs


def _is_cut(content: bytes) -> bool:
    """Whether an image that OpenCV reads ends early: it may fill up the rest with grey."""
    try:
        mmcv.imfrombytes(content, flag='unchanged', backend='pillow')
    except UnidentifiedImageError:
        return False  # a format that Pillow does not know
    except (OSError, SyntaxError):
        return True
    return False
