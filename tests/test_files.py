"""Files and folders that are written whole or not at all, whenever the process is killed."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from orepa_mm.files import folder_written_whole

NAMES = ('config.py', 'model.pth', 'report.json')
#: Writes the new result; killed at the given call of `Path.replace` (0: before any).
WRITER = '''
import os, signal, sys
from pathlib import Path
sys.path.append({PACKAGE!r})
import files  # not through the package, which takes seconds
calls, replace = int(sys.argv[2]), Path.replace
def counted(*args):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*args)
Path.replace = counted
with files.folder_written_whole(sys.argv[1], {NAMES!r}.__contains__) as temporary:
    for name in {NAMES!r}:
        (temporary / name).write_text('new')
    (temporary / 'scratch.json').touch()
'''.replace('{NAMES!r}', repr(NAMES)).replace('{PACKAGE!r}', repr(str(ROOT / 'orepa_mm')))


def write(folder, text):
    with folder_written_whole(folder, NAMES.__contains__) as temporary:
        for name in NAMES:
            (temporary / name).write_text(text)
        (temporary / 'scratch').mkdir()


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def killed(folder, calls):
    result = subprocess.run([sys.executable, '-c', WRITER, str(folder), str(calls)],
                            capture_output=True)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0


def test_it_appears_and_is_replaced(tmp_path):
    out = tmp_path / 'parent' / 'out'
    for text in ('old', 'new'):
        write(out, text)
        assert content(out) == dict.fromkeys(NAMES, text)
    assert [path.name for path in out.parent.iterdir()] == ['out']
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize('calls', range(4))
def test_a_kill_never_mixes_two_results(tmp_path, calls):
    out = tmp_path / 'out'
    write(out, 'old')
    dead = killed(out, calls)
    assert dead is (calls < 2)  # two renames, and no more
    lying = {path: content(path) for path in tmp_path.iterdir() if any(path.iterdir())}
    if calls == 1:  # between the two: both lie there complete
        assert not out.exists()
    else:
        assert content(out) == dict.fromkeys(NAMES, 'new' if calls > 1 else 'old')
    for path, files in lying.items():
        if '.new-' not in path.name:
            assert set(files) == set(NAMES)
            assert len(set(files.values())) == 1
    # the next one puts back what is missing, and clears away; it may fail itself
    with pytest.raises(OSError, match='disk'), folder_written_whole(out, NAMES.__contains__):
        raise OSError('the disk is full')
    assert content(out) == dict.fromkeys(NAMES, 'new' if calls > 1 else 'old')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_other_files_survive_and_nothing_is_mixed_into_them(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    for calls in (0, 1):
        assert killed(tmp_path, calls)
        assert (tmp_path / 'mine.txt').read_text() == 'mine'
        (tmp_path / 'config.py').unlink(missing_ok=True)  # a part of the new: nothing was there
    write(tmp_path, 'new')
    assert content(tmp_path) == {'mine.txt': 'mine', **dict.fromkeys(NAMES, 'new')}
    with pytest.raises(FileExistsError, match=r'\(config\.py, .*other files as well \(mine\.txt'):
        write(tmp_path, 'newer')
    assert content(tmp_path) == {'mine.txt': 'mine', **dict.fromkeys(NAMES, 'new')}


def test_the_current_folder_is_not_renamed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('.', 'old')
    assert content(tmp_path) == dict.fromkeys(NAMES, 'old')
    with pytest.raises(FileExistsError, match='current folder'):
        write('.', 'new')


def test_folders_of_living_processes_stay(tmp_path):
    out = tmp_path / 'out'
    with folder_written_whole(out, NAMES.__contains__) as first:
        write(out, 'second')
        assert first.is_dir()
        (first / 'model.pth').write_text('first')
    assert content(out) == {'model.pth': 'first'}
