"""Images to predict on: found in folders, by patterns, in videos; those that cannot be read named.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np

IMAGE_SUFFIXES = frozenset({'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
                            '.webp'})
VIDEO_SUFFIXES = frozenset({'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm',
                            '.wmv'})


@dataclass(frozen=True)
class Source:
    """A file with one image, or many.

    Attributes:
        path: The file.
        name: What to call it: its path below the folder that was given, without
            suffix. No other source has the same.
        count: Images in it: 1, or the number of frames that a video announces.
    """

    path: Path
    name: str
    count: int

    @property
    def is_video(self) -> bool:
        """Whether it holds frames."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Picture:
    """An image that was read.

    Attributes:
        name: That of the source, of a frame followed by `/` and its number,
            counted from 0, e.g. `street/000012`.
        file_name: The source's file, of a frame followed by `#` and its number.
        pixels: (H, W, 3) or, if read as grayscale, (H, W); blue, green, red.
    """

    name: str
    file_name: str
    pixels: np.ndarray

    @property
    def rgb(self) -> np.ndarray:
        """(H, W, 3), red, green, blue: what visualizers draw on."""
        pixels = self.pixels if self.pixels.ndim == 3 else mmcv.gray2bgr(self.pixels)
        return mmcv.bgr2rgb(pixels[..., :3])


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """Find images and videos.

    Args:
        inputs: Files; folders, whose images are taken, of subfolders and linked
            folders as well, but for hidden ones; patterns such as `data/*.jpg`.
            Of folders and patterns only files with the suffix of an image or, of
            a pattern, of a video are taken, links that lead nowhere among them;
            a file that is named is taken whatever its suffix.

    Returns:
        Each file once, in the order of `inputs`, those of one folder or pattern sorted.

    Raises:
        FileNotFoundError: If one of them stands for no file.
    """
    found: dict[str, tuple[Path, str]] = {}
    names: set[str] = set()
    for given in inputs:
        pairs = _files(Path(given).expanduser())
        if not pairs:
            what = 'no image in the folder' if Path(given).expanduser().is_dir() else 'no image'
            raise FileNotFoundError(f'there is {what} {given} (known are '
                                    f'{", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))})')
        for path, name in pairs:
            if (real := os.path.realpath(path)) not in found:
                found[real] = path, _unused(name, names)
    if not found:
        raise FileNotFoundError('no images were given: name files, folders or patterns')
    return [Source(path, name, _count(path)) for path, name in found.values()]


def read_pictures(sources: Iterable[Source], skipped: list[str], flag: str = 'color',
                  backend: str | None = None) -> Iterator[Picture]:
    """Read images one by one.

    Args:
        sources: Where they are.
        skipped: Gets a line for each file that cannot be read, whole or in part.
        flag: As of `mmcv.imread`; videos are read in colour.
        backend: As of `mmcv.imread`.

    Yields:
        Each image that can be read.
    """
    for source in sources:
        if not source.path.exists():
            skipped.append(f'{source.path}: it is not there, or a link that leads nowhere')
            continue
        if source.is_video:
            yield from _frames(source, skipped)
            continue
        try:
            pixels = mmcv.imread(str(source.path), flag=flag, backend=backend)
        except Exception as error:  # whatever a decoder raises
            skipped.append(f'{source.path}: {type(error).__name__}: {error}')
            continue
        if pixels is None:  # the decoder saw that it is damaged, or no image at all
            skipped.append(f'{source.path}: it is no image, or damaged')
            continue
        yield Picture(source.name, str(source.path), pixels)


def _files(path: Path) -> list[tuple[Path, str]]:
    """Files that a path or a pattern stands for, each with the name to give it."""
    if path.is_dir():
        return [(path / file, file.with_suffix('').as_posix()) for file in _below(path)
                if file.suffix.lower() in IMAGE_SUFFIXES and _is_file_or_link(path / file)]
    if path.is_file():
        return [(path, path.stem)]
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    return [(match, match.stem) for match in matches
            if match.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
            and _is_file_or_link(match)]


def _below(folder: Path) -> list[Path]:
    """What is no folder in a folder, but for hidden ones; links may lead in a circle."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        found += [Path(place, name).relative_to(folder) for name in files
                  if not name.startswith('.')]
    return sorted(found)


def _is_file_or_link(path: Path) -> bool:
    """Whether it is a file, or a link that leads nowhere: that is told of, where it is read."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _unused(name: str, names: set[str]) -> str:
    """The name, or the name with a number if it is taken; it is taken from now on."""
    number, unused = 1, name
    while unused in names:
        number += 1
        unused = f'{name}-{number}'
    names.add(unused)
    return unused


def _count(path: Path) -> int:
    if path.suffix.lower() not in VIDEO_SUFFIXES or not path.exists():
        return 1
    return max(1, int(mmcv.VideoReader(str(path)).frame_cnt))


def _frames(source: Source, skipped: list[str]) -> Iterator[Picture]:
    reader = mmcv.VideoReader(str(source.path))
    read = 0
    for read, pixels in enumerate(reader, start=1):
        number = f'{read - 1:06d}'
        yield Picture(f'{source.name}/{number}', f'{source.path}#{number}', pixels)
    if not read:
        skipped.append(f'{source.path}: it is no video, or damaged')
    elif read < source.count:
        skipped.append(f'{source.path}: it announces {source.count} frames, and after {read} none '
                       'could be read')
