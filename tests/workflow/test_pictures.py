"""Images to predict on: where they are links, to files, to folders, to nothing."""

import os

import mmcv
import numpy as np

from orepa_mm.workflow.pictures import find_sources, read_pictures


def image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    mmcv.imwrite(np.full((4, 4, 3), value, np.uint8), str(path))
    return path


def read(*inputs):
    skipped = []
    sources = find_sources(inputs)
    return {picture.name: int(picture.pixels[0, 0, 0])
            for picture in read_pictures(sources, skipped)}, skipped


def test_links_that_lead_nowhere_are_named(tmp_path):
    folder = tmp_path / 'a b'
    image(folder / 'good.png', 1)
    (folder / 'itself.png').symlink_to('itself.png')
    (folder / 'gone.mp4').symlink_to(tmp_path / 'unmounted' / 'gone.mp4')
    (folder / 'gone.png').symlink_to(tmp_path / 'unmounted' / 'gone.png')
    os.mkfifo(folder / 'waits.png')  # reading it would never end
    expected = ['gone.png', 'itself.png']
    for given, lost in ((folder, expected), (folder / '*.png', expected),
                        (folder / 'itself.png', ['itself.png']),
                        (folder / '*', ['gone.mp4', *expected])):
        pictures, skipped = read(given)
        assert pictures == ({} if given.name == 'itself.png' else {'good': 1})
        assert skipped == [f'{folder / name}: it is not there, or a link that leads nowhere'
                           for name in lost]


def test_linked_folders_are_entered_once(tmp_path):
    """Also such as lead back; what is below a hidden folder alone is hidden."""
    folder, elsewhere = tmp_path / 'data', tmp_path / 'disk'
    image(folder / '1.png', 1)
    image(elsewhere / 'train' / '2.png', 2)
    image(folder / '.cache' / '3.png', 3)
    image(folder / '.linked' / '4.png', 4)
    (folder / 'set').symlink_to(elsewhere)
    (folder / 'visible').symlink_to(folder / '.linked')
    (elsewhere / 'back').symlink_to(folder)
    (folder / 'round').symlink_to(folder)
    (folder / 'set-again').symlink_to(elsewhere / 'train')
    pictures, skipped = read(folder)
    assert pictures == {'1': 1, 'set/train/2': 2, 'visible/4': 4}
    assert not skipped
