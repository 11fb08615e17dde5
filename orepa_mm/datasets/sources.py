"""What folders in other formats than COCO's are read into: files, boxes, outlines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from PIL import ExifTags, Image

from ..errors import DataRootError
from .check_findings import Findings

#: Suffixes of the images that a folder of images is searched for, in lower case.
IMAGE_SUFFIXES = frozenset({'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff',
                            '.webp'})


@dataclasses.dataclass(frozen=True)
class Item:
    """The files of one image; whether they are there is not known.

    Attributes:
        image: The image.
        labels: Its label file.
    """

    image: Path
    labels: Path


@dataclasses.dataclass(frozen=True)
class Label:
    """One object.

    Attributes:
        place: Where it is written, for people: the label file and what tells the object there.
        category: The name of its class.
        box: x, y, width and height in pixels, counted from 0 at the image's left and top edge.
        polygon: Its outline, x and y in turns, in pixels; empty: only the box is known.
        more: Further entries of its annotation.
    """

    place: str
    category: str
    box: tuple[float, float, float, float]
    polygon: tuple[float, ...] = ()
    more: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def area(self) -> float:
        """Of the outline, or of the box, in square pixels."""
        if not self.polygon:
            return self.box[2] * self.box[3]
        x, y = self.polygon[::2], self.polygon[1::2]
        # from a corner of it: far from the origin the products would cancel
        return abs(sum((x[i - 1] - x[0]) * (y[i] - y[0]) - (x[i] - x[0]) * (y[i - 1] - y[0])
                       for i in range(len(x)))) / 2


#: Reads the labels of an image of so many pixels, width and height; adds what is wrong with them.
#: None: the image is to be left out.
Reader = Callable[[Item, tuple[int, int], Findings], list[Label] | None]


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder in another format.

    Attributes:
        format: Its name, for people.
        classes: The class names in their order; None: those of the labels, sorted.
        splits: The images of each split, or what stands in the way of reading it.
        settings: The files, beside images and labels, that the above was read from.
        read: Reads the labels of an image.
    """

    format: str
    classes: tuple[str, ...] | None
    splits: dict[str, list[Item] | DataRootError]
    settings: list[Path]
    read: Reader


def image_size(image: Path) -> tuple[int, int] | None:
    """Width and height in pixels, from the head of the file.

    Args:
        image: Its file.

    Returns:
        Those of the image as pipelines load it: turned as its EXIF says. None if it cannot be read.
    """
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError):
        return None
    return (height, width) if turned else (width, height)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without space around them.

    Args:
        path: The file; what is no UTF-8 in it is replaced.
    """
    # utf-8-sig: editors may have put a byte order mark first
    text = path.read_text(encoding='utf-8-sig', errors='replace')
    return [line.strip() for line in text.splitlines() if line.strip()]


def require_different(classes: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """Refuse class names that do not tell classes apart.

    Args:
        classes: The names.
        path: Where they are written.

    Returns:
        The same names.

    Raises:
        DataRootError: If there are none, one is empty, or two are the same.
    """
    if not classes or not all(classes) or len(set(classes)) < len(classes):
        raise DataRootError(f'{path} must give each class a name of its own, has {classes}')
    return classes
