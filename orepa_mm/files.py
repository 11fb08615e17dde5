"""Files: written whole or not at all, and recognised by their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: Seconds to wait for whoever has locked a folder: files are renamed in less.
_PATIENCE = 5.0


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary name; it gets its own only if nothing fails.

    A file that is there already passes on its permissions, and a link stays one.
    What killed processes left of the same file is removed.

    Args:
        path: The file to be. Its folder is created.

    Yields:
        The temporary path to write to, in the same folder and with the same suffix.

    Raises:
        OSError: If it cannot be written; it names the file to be, not the temporary one.
    """
    path = Path(os.path.realpath(path))
    require_writable_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.stem)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    with _made(path.parent, path.stem, path.suffix, mode) as temporary, _naming(temporary, path):
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)


def require_writable_file(path: str | Path) -> None:
    """Refuse a file that cannot be written, before long work; nothing is left behind.

    Args:
        path: The file to be; it and its folders may be missing.

    Raises:
        OSError: If it cannot; it names what stands in the way.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder, where a file is to be written: choose '
                                'another path')
    require_writable_folder(path.parent)


def require_writable_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be written to, before long work; nothing is left behind.

    Args:
        folder: The folder to be; it and those above it may be missing.

    Raises:
        OSError: If it cannot; it names what stands in the way.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        name = 'it' if there == folder else str(there)
        raise NotADirectoryError(f'{folder} cannot be a folder to write to: {name} is '
                                 f'{"a file" if there.exists() else "a broken link"}; choose '
                                 'another path')
    try:  # whether one may, and the disk can, only trying tells
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(f'{there}: nothing can be written into this folder '
                              f'({error.strerror}); choose another path') from error


@contextlib.contextmanager
def _naming(temporary: Path, path: Path) -> Iterator[None]:
    """Let what goes wrong with a temporary file or folder, or with none, name what is to be."""
    try:
        yield
    except OSError as error:
        named = temporary if error.filename is None else Path(os.fsdecode(error.filename))
        if error.errno is None or not named.is_relative_to(temporary):
            raise
        raise OSError(error.errno, error.strerror,
                      str(path / named.relative_to(temporary))) from error
    except RuntimeError as error:
        # PyTorch's writer hides the system's error, and the folder was there a moment ago
        if not re.search('PytorchStreamWriter|inline_container', str(error)):
            raise
        raise OSError(errno.ENOSPC, 'it could not be written whole, the disk is probably full',
                      str(path)) from error


def remove_unfinished(folder: str | Path, stem: str | None = None) -> int:
    """Remove the temporary files that killed processes left in a folder.

    Who writes one holds a lock on it, which ends with the process. Where a disk
    knows no locks, nothing is removed.

    Args:
        folder: Where `written_whole` wrote.
        stem: Of the file to be, its name without suffix; any by default.

    Returns:
        How many were removed; those of other users may have to stay.
    """
    removed = 0
    for path, _, descriptor in _left_by_killed(Path(folder), stem):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed


@contextlib.contextmanager
def folder_written_whole(folder: str | Path, owned: Callable[[str], bool]) -> Iterator[Path]:
    """Write the files of a folder elsewhere; they get their place only if nothing fails.

    A kill at any moment leaves the earlier result or the new one, never parts
    of both:

    - There is no such folder: the new one is renamed.
    - It holds an earlier result and nothing else: it is renamed aside, and the
      new one takes its name, and its permissions. Killed between the two renames,
      it lies beside its name (`.NAME.aside-...`) and the next call puts it back.
    - It holds other files, and no earlier result: the new files are renamed into
      it one by one, in the order of their names. So they are if other files, and
      no result, came meanwhile.
    - It holds both, or a result and cannot be renamed (a mount point, the current
      folder): that is refused at once, or before anything is renamed if it came
      to that meanwhile.

    What killed processes left beside the folder is removed, see `remove_unfinished`.

    Args:
        folder: The folder to be.
        owned: Tells by its name whether a file belongs to a result. Others that
            are written are left behind.

    Yields:
        The temporary folder to write to, empty.

    Raises:
        FileExistsError: If an earlier result, or that of another process which was
            faster, cannot be replaced as a whole.
        OSError: If it cannot be written; it names the folder to be, not the temporary one.
    """
    folder = Path(folder).resolve()
    require_writable_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(folder)
    inside = folder.is_dir() and not _is_replaceable(folder, owned)
    with _made(folder if inside else folder.parent, folder.name, folder=True) as temporary:
        with _naming(temporary, folder):
            yield temporary
        for path in list(temporary.iterdir()):
            if not owned(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in (temporary, *temporary.iterdir()):
            before = folder / path.name if path != temporary else folder
            if before.exists() and not inside:
                path.chmod(stat.S_IMODE(before.stat().st_mode))
        with _locked(folder):  # what lies there may have changed
            inside = folder.is_dir() and not _is_replaceable(folder, owned)
            for path in sorted(temporary.iterdir()) if inside else ():
                path.replace(folder / path.name)
            if not inside:
                _exchange(folder, temporary)


def _exchange(folder: Path, new: Path) -> None:
    """Put a new folder in place of one that may be there, whose lock is held."""
    aside = folder.with_name(_name(folder.name, 'aside'))
    if folder.exists():
        folder.replace(aside)
    try:
        new.replace(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f'{folder}: another process wrote its result there meanwhile, and '
                              'that one stands') from error
    finally:
        if aside.exists() and not folder.exists():
            aside.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _is_replaceable(folder: Path, owned: Callable[[str], bool]) -> bool:
    """Whether a folder may be renamed; an error if it must be, to replace a result, and may not."""
    temporary = _temporary()  # another process may be writing its result in there
    result: list[str] = []
    others: list[str] = []
    for name in sorted(os.listdir(folder)):
        (result if owned(name) and not temporary.match(name) else others).append(name)
    fixed = folder.is_mount() or Path.cwd().is_relative_to(folder)
    if result and (others or fixed):
        reason = (f'other files as well ({", ".join(others[:3])})' if others
                  else 'is in use as the current folder or as a mount point')
        raise FileExistsError(
            f'{folder} holds an earlier result ({", ".join(result)}) and {reason}: the result '
            'cannot be replaced as a whole. Delete it, or choose another folder')
    return not (others or fixed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes waiting, if there is such a folder and its disk knows locks."""
    with contextlib.ExitStack() as stack:
        if folder.is_dir():
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which unlocks it, as a kill does
            latest = time.monotonic() + _PATIENCE
            while _lock(descriptor) is False and time.monotonic() < latest:
                time.sleep(0.02)
        yield


def _name(name: str, kind: str, suffix: str = '') -> str:
    return f'.{name}.{kind}-{secrets.token_hex(4)}{suffix}'


def _temporary(name: str | None = None) -> re.Pattern[str]:
    """What `_name` gives, for any name and kind."""
    named = '.+' if name is None else re.escape(name)
    return re.compile(rf'\.{named}\.(new|aside)-[0-9a-f]{{8}}(\.|$)')


@contextlib.contextmanager
def _made(parent: Path, name: str, suffix: str = '', mode: int | None = None,
          folder: bool = False) -> Iterator[Path]:
    """A new file or folder under a temporary name, locked; removed at the end if it is there."""
    while True:
        path = parent / _name(name, 'new', suffix)
        with contextlib.suppress(FileExistsError):
            if folder:
                path.mkdir()
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600))
            try:
                descriptor = _opened(path)
            except FileNotFoundError:
                continue
            # who clears away may have been faster, and has the lock or had it
            if _lock(descriptor) is not False and path.exists():
                break
            os.close(descriptor)
    try:
        yield path
    finally:
        if folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _opened(path: Path) -> int:
    # to lock what it is open for reading alone, NFS refuses; a folder can be open in no other way
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder: False if another process has, None if that cannot be told."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # of a disk without locks, and on Windows
        return None
    return True


def _left_by_killed(folder: Path, name: str | None) -> Iterator[tuple[Path, str, int]]:
    """Temporary files and folders that nobody holds, each with its kind, open and locked."""
    names = os.listdir(folder) if folder.is_dir() and os.access(folder, os.R_OK) else []
    for match in filter(None, map(_temporary(name).match, sorted(names))):
        path = folder / match.string
        try:
            descriptor = _opened(path)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                yield path, match[1], descriptor
        finally:
            os.close(descriptor)


def _clean_up(folder: Path) -> None:
    """Put back a folder that a killed process renamed; remove what such processes left."""
    for parent in (folder.parent, folder):
        for path, kind, _ in _left_by_killed(parent, folder.name):
            if kind == 'aside' and not folder.exists():
                path.replace(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
