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
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary name; it gets its own only if nothing fails.

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


def remove_unfinished(folder: str | Path) -> int:
    """Remove the temporary files that killed processes of this machine left in a folder.

    Args:
        folder: Where `written_whole` wrote.

    Returns:
        How many there were.
    """
    pattern = re.compile(r'\..+\.new-' + re.escape(platform.node()) + r'-(\d+)-')
    folder = Path(folder)
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_file()
             and (match := pattern.match(path.name)) and not _is_alive(int(match[1]))]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


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
      it one by one, in the order of their names.
    - It holds both, or cannot be renamed (a mount point, the current folder): that
      is refused at once.

    What killed processes of this machine left beside the folder is removed.

    Args:
        folder: The folder to be.
        owned: Tells by its name whether a file belongs to a result. Others that
            are written are left behind.

    Yields:
        The temporary folder to write to, empty.

    Raises:
        FileExistsError: If an earlier result cannot be replaced as a whole, or another
            process was faster.
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
        if inside:
            for path in sorted(temporary.iterdir()):
                path.replace(folder / path.name)
        else:
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
    names = sorted(path.name for path in folder.iterdir())
    result, others = ([name for name in names if owned(name) is kind] for kind in (True, False))
    fixed = folder.is_mount() or Path.cwd().is_relative_to(folder)
    if result and (others or fixed):
        reason = (f'other files as well ({", ".join(others[:3])})' if others
                  else 'is in use as the current folder or as a mount point')
        raise FileExistsError(
            f'{folder} holds an earlier result ({", ".join(result)}) and {reason}: the result '
            'cannot be replaced as a whole. Delete it, or choose another folder')
    return not (others or fixed)


def _prefix(folder: Path, kind: str) -> str:
    return f'.{folder.name}.{kind}-{platform.node()}-{os.getpid()}-'


def _clean_up(folder: Path) -> None:
    """Put back a folder that a killed process renamed; remove what such processes left."""
    pattern = re.compile(re.escape(f'.{folder.name}.') + '(new|old)-'
                         + re.escape(platform.node()) + r'-(\d+)-')
    for parent in (folder.parent, folder):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            found = pattern.match(path.name)
            if not found or _is_alive(int(found[2])):
                continue
            if found[1] == 'old' and any(path.iterdir()) and not folder.exists():
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
