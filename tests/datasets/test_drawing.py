"""Pictures of single objects, looked at pixel by pixel."""

import cv2
import numpy as np
import pytest

from orepa_mm.datasets.drawing import FILLS, OUTLINES, draw_object, draw_scene

#: Area over that of the circle around it.
AREAS = {'circle': 1, 'ring': 1 - 0.55**2, 'square': 2 / np.pi,
         'triangle': 3 * np.sqrt(3) / 4 / np.pi, 'cross': 2 / np.pi,
         'star': 10 * 0.45 * np.sin(np.pi / 5) / 2 / np.pi}


def coloured(picture):
    """Where the object is: the ground is grey."""
    spread = cv2.GaussianBlur(picture, (3, 3), 0).astype(int)
    return (spread.max(axis=2) - spread.min(axis=2)) > 60


def objects(outline, fill, count=6, size=256):
    for seed in range(count):
        picture = draw_object(np.random.default_rng(seed), size, outline, fill)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        yield picture, coloured(picture)


@pytest.mark.parametrize('outline', OUTLINES)
def test_outlines_by_their_area_and_hole(outline):
    for picture, mask in objects(outline, 'plain'):
        points = np.argwhere(mask)[:, ::-1].astype(np.float32)
        _, radius = cv2.minEnclosingCircle(points)
        assert 0.21 * 256 < radius < 0.43 * 256
        assert mask.sum() / (np.pi * radius**2) == pytest.approx(AREAS[outline], abs=0.06)
        inside = cv2.erode(mask.astype(np.uint8), np.ones((7, 7))) > 0
        assert picture[inside].std(axis=0).max() < 3  # one colour
        assert not mask[[0, -1]].any()  # nothing is cut off
        assert not mask[:, [0, -1]].any()
        parts, _ = cv2.connectedComponents((~mask).astype(np.uint8))
        assert parts - 1 == (2 if outline == 'ring' else 1)


@pytest.mark.parametrize('outline', OUTLINES)
def test_stripes_are_dark_and_cover_about_half(outline):
    shares = []
    for seed in range(6):
        plain, striped = (draw_object(np.random.default_rng(seed), 128, outline, fill)
                          for fill in FILLS)
        # both have the same place, size and colour
        inside = cv2.erode(coloured(plain).astype(np.uint8), np.ones((7, 7))) > 0
        shares.append((striped[inside].max(axis=1) < 90).mean())
        assert np.array_equal(plain[0], striped[0])
    assert min(shares) > 0.3
    assert max(shares) < 0.7


def test_objects_differ_in_place_size_and_colour():
    masks, colours = [], []
    for picture, mask in objects('square', 'plain', count=20):
        masks.append(np.argwhere(mask))
        colours.append(picture[mask].mean(axis=0))
    assert np.std([len(mask) for mask in masks]) > 0.2 * np.mean([len(mask) for mask in masks])
    assert np.std([mask.mean(axis=0) for mask in masks], axis=0).min() > 256 / 20
    assert np.std(colours, axis=0).min() > 30


def test_the_generator_decides():
    for draw in (lambda g: draw_scene(g, 64)[0], lambda g: draw_object(g, 64, 'star', 'striped')):
        pictures = [draw(np.random.default_rng(seed)) for seed in (1, 1, 2)]
        assert np.array_equal(pictures[0], pictures[1])
        assert not np.array_equal(pictures[0], pictures[2])
