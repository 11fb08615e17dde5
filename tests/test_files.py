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


#: As of a container whose processes nobody else sees: it may have any host name and any number.
HOLDER = f'''
import os, sys
sys.path.append({str(ROOT / 'orepa_mm')!r})
import files
with files.written_whole(sys.argv[1]) as file, files.folder_written_whole(
        sys.argv[2], lambda name: True) as folder:
    file.write_text('theirs')
    (folder / 'model.pth').write_text('theirs')
    print(file, folder, sep='\\n', flush=True)
    sys.stdin.read()
'''


def test_what_a_process_still_writes_stays_whoever_can_see_it(tmp_path, monkeypatch):
    """Neither host name nor process number tells: another container may have the same ones."""
    path, out = tmp_path / 'x.pth', tmp_path / 'out'
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, path, out], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held = [Path(holder.stdout.readline().strip()) for _ in range(2)]
    for number in (os.getpid(), holder.pid):
        monkeypatch.setattr(os, 'getpid', lambda number=number: number)
        monkeypatch.setattr(os, 'kill', lambda *_: (_ for _ in ()).throw(ProcessLookupError()))
        with written_whole(path) as temporary:
            temporary.write_text('ours')
        write(out, 'ours')
        assert remove_unfinished(tmp_path) == 0
        assert all(item.exists() for item in held)
    monkeypatch.undo()
    holder.kill()
    holder.wait()
    assert remove_unfinished(tmp_path) == 1
    write(out, 'ours')
    assert sorted(item.name for item in tmp_path.iterdir()) == ['out', 'x.pth']


def test_nothing_is_removed_where_nobody_can_tell(tmp_path, monkeypatch):
    """On a disk without locks, and what version 0.2.0 left, which knew none."""
    fcntl = pytest.importorskip('fcntl')
    old = tmp_path / f'.x.new-host-{2**22 + 1}-abc.pth'
    old.touch()
    subprocess.run([sys.executable, '-c', FILE_WRITER, tmp_path / 'x.pth'], check=False)

    def refused(*_):
        raise OSError(errno.ENOLCK, 'no locks')

    monkeypatch.setattr(fcntl, 'flock', refused)
    assert remove_unfinished(tmp_path) == 0
    with written_whole(tmp_path / 'x.pth') as temporary:
        temporary.write_text('new')
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.undo()
    assert remove_unfinished(tmp_path) == 1
    assert old.exists()


@pytest.mark.parametrize('mode', [0o600, 0o640, 0o444, 0o755])
def test_permissions_are_passed_on(tmp_path, mode):
    path, out = tmp_path / 'x.pth', tmp_path / 'out'
    write(out, 'old')
    path.write_text('old')
    inside = out / 'model.pth'
    for item in (path, out, inside):
        item.chmod(mode | (0o700 if item == out else 0))
    before = [item.stat().st_mode for item in (path, out, inside)]
    with written_whole(path) as temporary:
        assert temporary.stat().st_mode & 0o077 == 0  # nobody else may read what is not done
        temporary.write_text('new')
    write(out, 'new')
    assert [item.stat().st_mode for item in (path, out, inside)] == before
    assert path.read_text() == inside.read_text() == 'new'


@pytest.mark.parametrize('exists', [True, False])
def test_a_link_stays_a_link(tmp_path, exists):
    (tmp_path / 'store').mkdir()
    target, link = tmp_path / 'store' / 'x.pth', tmp_path / 'link.pth'
    if exists:
        target.write_text('old')
    link.symlink_to(target)
    with written_whole(link) as temporary:
        temporary.write_text('new')
    assert link.is_symlink()
    assert target.read_text() == 'new'
    assert [path.name for path in target.parent.iterdir()] == ['x.pth']
    folder = tmp_path / 'out'
    folder.symlink_to(target.parent / 'out')
    write(folder, 'new')
    assert folder.is_symlink()
    assert content(target.parent / 'out') == dict.fromkeys(NAMES, 'new')


def test_new_files_have_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / 'x.pth'):
            pass
        write(tmp_path / 'out', 'new')
    finally:
        os.umask(before)
    assert (tmp_path / 'x.pth').stat().st_mode & 0o777 == 0o640
    assert (tmp_path / 'out').stat().st_mode & 0o777 == 0o750


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
