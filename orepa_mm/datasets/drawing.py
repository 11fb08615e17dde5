"""Pictures of the generated data sets: shapes on grey, noisy ground."""

from __future__ import annotations

import cv2
import numpy as np

#: What `draw_scene` draws.
SHAPES = ('circle', 'square', 'triangle')
#: What `draw_object` draws, and how it fills it.
OUTLINES = ('circle', 'ring', 'square', 'triangle', 'star', 'cross')
FILLS = ('plain', 'striped')

#: Number of corners of the polygon that stands for a regular shape.
_CORNERS = {'circle': 32, 'square': 4, 'triangle': 3}
#: Bits behind the binary point of the corners' coordinates.
_SHIFT = 4


def draw_scene(generator: np.random.Generator,
               size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Several shapes that do not overlap.

    Args:
        generator: Decides everything.
        size: Height and width in pixels, at least 64.

    Returns:
        The picture, `(size, size, 3)`, BGR, uint8; and for each shape its index
        in `SHAPES` and its polygon `(n, 2)`, x and y in pixels.
    """
    picture = _draw_ground(generator, size)
    shapes: list[tuple[int, np.ndarray]] = []
    taken: list[tuple[np.ndarray, float]] = []
    for _ in range(generator.integers(3, 8)):
        radius = generator.uniform(0.08, 0.2) * size
        centre = generator.uniform(radius, size - 1 - radius, 2)
        if any(np.linalg.norm(centre - other) < radius + r for other, r in taken):
            continue
        taken.append((centre, radius))
        category = int(generator.integers(len(SHAPES)))
        polygon = centre + radius * _regular(SHAPES[category], generator.uniform(-0.3, 0.3))
        fill_polygon(picture, polygon, _vivid_colour(generator), cv2.LINE_AA)
        shapes.append((category, polygon))
    return picture, shapes


def fill_polygon(picture: np.ndarray, polygon: np.ndarray, value: int | list[int],
                 line_type: int = cv2.LINE_8) -> None:
    """Fill a shape of `draw_scene`: in the picture, or in a label image of the same size.

    Args:
        picture: `(h, w)` or `(h, w, 3)`, uint8; changed in place.
        polygon: `(n, 2)`, x and y in pixels.
        value: Class or colour.
        line_type: `cv2.LINE_AA` for smooth edges.
    """
    cv2.fillPoly(picture, [polygon.round().astype(np.int32)], value, line_type)


def draw_object(generator: np.random.Generator, size: int, outline: str,
                fill: str) -> np.ndarray:
    """One object at a random place, in a random size and colour, slightly rotated.

    Args:
        generator: Decides everything but the next three.
        size: Height and width in pixels, at least 32.
        outline: One of `OUTLINES`.
        fill: One of `FILLS`.

    Returns:
        The picture, `(size, size, 3)`, BGR, uint8.
    """
    picture = _draw_ground(generator, size)
    radius = generator.uniform(0.22, 0.42) * size
    # two pixels to the border: smooth edges are wider than the shape
    centre = generator.uniform(radius + 2, size - 3 - radius, 2)
    rotation = generator.uniform(-0.3, 0.3)
    paint = np.full((size, size, 3), _vivid_colour(generator), np.float32)
    if fill == 'striped':
        direction, phase = generator.uniform(0, np.pi), generator.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[:size, :size] / radius
        along = columns * np.cos(direction) + rows * np.sin(direction)
        paint[np.sin(along * 4 * np.pi + phase) < 0] *= 0.3  # four dark stripes
    mask = np.zeros((size, size), np.uint8)
    contours = [((centre + radius * contour) * 2**_SHIFT).round().astype(np.int32)
                for contour in _contours(outline, rotation)]
    cv2.fillPoly(mask, contours, 255, cv2.LINE_AA, _SHIFT)
    opacity = mask[..., None] / np.float32(255)
    return (picture + (paint - picture) * opacity).round().astype(np.uint8)


def _draw_ground(generator: np.random.Generator, size: int) -> np.ndarray:
    ground = generator.uniform(90, 150)
    coarse = generator.normal(0, 8, (size // 16, size // 16, 3)).astype(np.float32)
    picture = ground + cv2.resize(coarse, (size, size)) + generator.normal(0, 6, (size, size, 3))
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))


def _vivid_colour(generator: np.random.Generator) -> list[int]:
    vivid = np.uint8([[[generator.integers(180), 230, 230]]])
    return cv2.cvtColor(vivid, cv2.COLOR_HSV2BGR)[0, 0].tolist()


def _regular(name: str, rotation: float) -> np.ndarray:
    """A regular polygon `(n, 2)` of radius 1 around the origin; upright, but for the rotation."""
    corners = _CORNERS[name]
    angles = (rotation - np.pi * (0.5 if corners == 3 else 0.25)
              + np.arange(corners) * 2 * np.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _contours(outline: str, rotation: float) -> list[np.ndarray]:
    """One polygon `(n, 2)` of radius 1 around the origin; a ring has a second one, its hole."""
    if outline in _CORNERS:
        return [_regular(outline, rotation)]
    if outline == 'ring':
        return [_regular('circle', 0), 0.55 * _regular('circle', 0)]
    if outline == 'star':
        angles = rotation - np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.45, 1)
        return [radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)]
    # a cross: three corners for each of its arms, the arms of a third of its width
    arm = np.array([[1, -1], [3, -1], [3, 1]]) / np.sqrt(10)
    cosines, sines = (f(rotation + np.arange(4) * np.pi / 2) for f in (np.cos, np.sin))
    turns = np.stack([np.stack([cosines, -sines], 1), np.stack([sines, cosines], 1)], 1)
    return [np.concatenate([arm @ turn.T for turn in turns])]
