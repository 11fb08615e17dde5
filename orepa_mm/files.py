"""Files: written whole or not at all, and recognised by their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
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

    What killed processes of this machine left of the same file is removed.

    Args:
        path: The file to be. Its folder is created.

    Yields:
        The temporary path to write to, in the same folder and with the same suffix.

    Raises:
        OSError: If it cannot be written; it names the file to be, not the temporary one.
    """
    path = Path(path)
    require_writable_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.stem)
    handle, temporary = tempfile.mkstemp(prefix=_prefix(path.parent / path.stem, 'new'),
                                         suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        with _naming(Path(temporary), path):
            yield Path(temporary)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


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
    """Remove the temporary files that killed processes of this machine left in a folder.

    Args:
        folder: Where `written_whole` wrote.
        stem: Of the file to be, its name without suffix; any by default.

    Returns:
        How many were removed; those of other users may have to stay.
    """
    removed = 0
    for path, _ in _left_by_killed(Path(folder), stem):
        if path.is_file():
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
      new one takes its name. Killed between the two renames, it lies beside its
      name (`.NAME.old-HOST-PID`) and the next call puts it back.
    - It holds other files, and no earlier result: the new files are renamed into
      it one by one, in the order of their names. So they are if other files, and
      no result, came meanwhile.
    - It holds both, or a result and cannot be renamed (a mount point, the current
      folder): that is refused at once, or before anything is renamed if it came
      to that meanwhile.

    What killed processes of this machine left beside the folder is removed.

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
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(folder, 'new'),
                                      dir=folder if inside else folder.parent))
    try:
        with _naming(temporary, folder):
            yield temporary
        for path in list(temporary.iterdir()):
            if not owned(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with _locked(folder):  # what lies there may have changed
            inside = folder.is_dir() and not _is_replaceable(folder, owned)
            for path in sorted(temporary.iterdir()) if inside else ():
                path.replace(folder / path.name)
        if not inside:
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)  # mkdtemp makes private folders
            old = Path(tempfile.mkdtemp(prefix=_prefix(folder, 'old'), dir=folder.parent))
            try:
                if folder.exists():
                    folder.replace(old)  # onto an empty folder
                try:
                    temporary.replace(folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    raise FileExistsError(f'{folder}: another process wrote its result there '
                                          'meanwhile, and that one stands') from error
            finally:
                if not folder.exists() and any(old.iterdir()):
                    old.replace(folder)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        if fcntl is not None and folder.is_dir():
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which unlocks it, as a kill does
            latest = time.monotonic() + _PATIENCE
            with contextlib.suppress(OSError):
                while not _is_lockable(descriptor) and time.monotonic() < latest:
                    time.sleep(0.02)
        yield


def _is_lockable(descriptor: int) -> bool:
    """Lock an open file or folder, unless another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prefix(folder: Path, kind: str) -> str:
    return f'.{folder.name}.{kind}-{platform.node()}-{os.getpid()}-'


def _temporary(name: str | None = None, host: str | None = None) -> re.Pattern[str]:
    """What `_prefix` gives, for any name, any kind, any machine and any process."""
    named, there = ('.+' if text is None else re.escape(text) for text in (name, host))
    return re.compile(rf'\.{named}\.(new|old)-{there}-(\d+)-')


def _left_by_killed(folder: Path, name: str | None) -> list[tuple[Path, str]]:
    """Temporary files and folders of dead processes of this machine, each with its kind."""
    pattern = _temporary(name, platform.node())
    names = os.listdir(folder) if folder.is_dir() and os.access(folder, os.R_OK) else []
    matches = map(pattern.match, sorted(names))
    return [(folder / match.string, match[1]) for match in matches
            if match and not _is_alive(int(match[2]))]


def _clean_up(folder: Path) -> None:
    """Put back a folder that a killed process renamed; remove what such processes left."""
    for parent in (folder.parent, folder):
        for path, kind in _left_by_killed(parent, folder.name):
            if kind == 'old' and any(path.iterdir()) and not folder.exists():
                path.replace(folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether a process of this machine runs; where that cannot be told, it does."""
    if os.name != 'posix':
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
