"""Files and folders that are written whole or not at all, whenever the process is killed."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from orepa_mm.files import (
    folder_written_whole,
    remove_unfinished,
    require_writable_file,
    require_writable_folder,
    written_whole,
)

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


#: Left in the middle of writing a file.
FILE_WRITER = f'''
import os, signal, sys
sys.path.append({str(ROOT / 'orepa_mm')!r})
import files
with files.written_whole(sys.argv[1]) as temporary:
    temporary.write_text('half')
    os.kill(os.getpid(), signal.SIGKILL)
'''


def test_the_next_writer_of_a_file_removes_what_killed_ones_left(tmp_path):
    path, other = tmp_path / 'a b.pth', tmp_path / 'a b.c.pth'
    for killed_at in (path, other):
        subprocess.run([sys.executable, '-c', FILE_WRITER, killed_at], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    with written_whole(path) as living, written_whole(path) as second:
        assert living.exists()  # of this process, which lives
        second.write_text('second')
        living.write_text('first')
    assert path.read_text() == 'first'
    assert len(list(tmp_path.iterdir())) == 2  # that of the other file is no business of this one
    assert remove_unfinished(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('node', ['ip-10-0-0-5', 'a', 'x.new-b-1-c'])
def test_machines_of_any_name_are_told_apart(tmp_path, monkeypatch, node):
    dead = 2**22 + 1  # beyond what Linux counts to
    monkeypatch.setattr('platform.node', lambda: node)
    for host in (node, 'another'):
        for process in (dead, os.getpid()):
            (tmp_path / f'.x.new-{host}-{process}-abc.tar-12-x').touch()
    with written_whole(tmp_path / 'x.pth'):
        pass
    left = {path.name for path in tmp_path.iterdir()} - {'x.pth'}
    assert left == {f'.x.new-{host}-{process}-abc.tar-12-x' for host, process in (
        ('another', dead), ('another', os.getpid()), (node, os.getpid()))}


def write_while(folder, meanwhile):
    with folder_written_whole(folder, NAMES.__contains__) as temporary:
        (temporary / 'model.pth').write_text('first')
        meanwhile()


def test_two_writers_do_not_mix_their_results_among_other_files(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='earlier result'):
        write_while(tmp_path, lambda: write(tmp_path, 'second'))
    assert content(tmp_path) == {'mine.txt': 'mine', **dict.fromkeys(NAMES, 'second')}


def test_files_that_come_meanwhile_survive(tmp_path):
    """A folder that was empty, or held a result alone, is no longer replaced as a whole."""
    out = tmp_path / 'out'
    out.mkdir()
    mine = out / 'mine.txt'
    write_while(out, lambda: mine.write_text('mine'))
    assert content(out) == {'mine.txt': 'mine', 'model.pth': 'first'}
    mine.unlink()
    (out / 'model.pth').write_text('older')
    with pytest.raises(FileExistsError, match=r'other files as well \(mine\.txt'):
        write_while(out, lambda: mine.write_text('mine'))
    assert content(out) == {'mine.txt': 'mine', 'model.pth': 'older'}
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_current_folder_is_written_into_by_one_process_alone(tmp_path, monkeypatch):
    """Whatever is in it belongs to a result here, but for what another process is writing."""
    monkeypatch.chdir(tmp_path)
    with folder_written_whole('.', lambda name: True) as first:
        (first / 'x').write_text('first')
        with folder_written_whole('.', lambda name: True) as second:
            (second / 'y').write_text('second')
        (tmp_path / 'y').unlink()
    assert content(tmp_path) == {'x': 'first'}


def test_a_folder_is_locked_while_files_move_into_it(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    (tmp_path / 'mine.txt').write_text('mine')
    replace, locked = Path.replace, []

    def watched(*paths):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        locked.append(paths[1].name)
        return replace(*paths)

    monkeypatch.setattr(Path, 'replace', watched)
    write(tmp_path, 'new')
    assert locked == list(NAMES)


def test_a_lock_of_somebody_else_does_not_stop_it(tmp_path, monkeypatch):
    """As of the command `flock FOLDER ...`, which waits for this very process."""
    fcntl = pytest.importorskip('fcntl')
    monkeypatch.setattr('orepa_mm.files._PATIENCE', 0.05)
    (tmp_path / 'mine.txt').write_text('mine')
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write(tmp_path, 'new')
    os.close(descriptor)
    assert content(tmp_path) == {'mine.txt': 'mine', **dict.fromkeys(NAMES, 'new')}


def full(*names):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


def write_half(writing, place, named=False):
    """Write a file whose disk is full; the system's error names it, or none."""
    with writing as temporary:
        path = place(temporary)
        path.write_text('half')
        raise full(*[str(path)] * named)


class FullDisk:
    """What PyTorch writes into until the disk is full; it hides the reason."""

    def __init__(self, path):
        self.file = path.open('wb')

    def write(self, content):
        if self.file.tell() + len(content) > 5000:
            raise full()
        return self.file.write(content)

    def flush(self):
        pass


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / 'a b.pth'
    path.write_text('old')
    with pytest.raises(OSError, match='No space left') as error:
        write_half(written_whole(path), lambda temporary: temporary)
    assert error.value.filename == str(path)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match='the disk is probably full') as error, (
            written_whole(path)) as temporary:
        torch.save(torch.zeros(5000), FullDisk(temporary))
    assert error.value.filename == str(path)
    folder = tmp_path / 'out'
    with pytest.raises(OSError, match='No space left') as error:
        write_half(folder_written_whole(folder, NAMES.__contains__),
                   lambda temporary: temporary / 'model.pth', named=True)
    assert error.value.filename == str(folder / 'model.pth')
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_errors_about_other_files_stay_as_they_are(tmp_path):
    for wrong in (FileNotFoundError('there is no x'), FileNotFoundError(2, 'x', '/no/such'),
                  RuntimeError('x')):
        with pytest.raises(type(wrong)) as error, written_whole(tmp_path / 'x'):
            raise wrong
        assert error.value is wrong


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() != 0, reason='becomes another user')
def test_folders_of_others_are_refused_by_name(tmp_path):
    """Only the superuser can try this: it may write anywhere itself."""
    for parent in (tmp_path, *tmp_path.parents):  # pytest's own are closed to others
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        for refuse, path in ((require_writable_folder, tmp_path / 'new' / 'out'),
                             (require_writable_folder, tmp_path),
                             (require_writable_file, tmp_path / 'x.pth')):
            with pytest.raises(PermissionError, match='nothing can be written') as error:
                refuse(path)
            assert str(tmp_path) in str(error.value)
        for write in (lambda: written_whole(tmp_path / 'x.pth'),
                      lambda: folder_written_whole(tmp_path / 'out', NAMES.__contains__)):
            with pytest.raises(PermissionError, match='nothing can be written'), write():
                pass
    finally:
        os.seteuid(0)
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_of_an_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ('', '.', 'new/a b/out', tmp_path):
        require_writable_folder(path)
    require_writable_file('x.pth')
    require_writable_file(tmp_path / 'new' / 'x.pth')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    with pytest.raises(NotADirectoryError, match=r'^file .*: it is a file'):
        require_writable_folder('file')
    with pytest.raises(NotADirectoryError, match=r'^file/a/b .*: \S*/file is a file'):
        require_writable_folder('file/a/b')
    with pytest.raises(NotADirectoryError, match='a broken link'):
        require_writable_folder('link/a')
    with pytest.raises(IsADirectoryError, match='a folder, where a file is to be written'):
        require_writable_file(tmp_path)
