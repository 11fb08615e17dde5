"""The errors that a user may see, and how a tool shows them."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Something given to the package is not what it needs; the message says what to do."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is not what was asked for; the message says what it is."""


class ConfigError(UserError, ValueError):
    """A config lacks what was asked of it; the message says what."""


class DamagedFileError(UserError, ValueError):
    """A file that is read, and is no checkpoint, is torn or of another kind; it is named."""


class DataRootError(UserError, ValueError):
    """A folder is not laid out as the config expects; the message says how it is."""


class NothingToConvertError(UserError, ValueError):
    """A model has no layer to re-parameterize, and none was converted before."""


class VerificationError(UserError, RuntimeError):
    """Two forms differ: nothing was saved. The message says where and how much."""


class OnnxExportError(UserError, RuntimeError):
    """A model has no ONNX form; the message says why."""


class DivergedError(UserError, RuntimeError):
    """Weights became NaN or infinite in training; the message names the last good checkpoint."""


class DryRunError(UserError, RuntimeError):
    """A step of a dry run failed; the message names it."""


#: What to do about a fault of the system that a file met.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), 'free some space, or write elsewhere'),
    **dict.fromkeys((errno.EACCES, errno.EPERM), 'change its permissions, or choose another path'),
    **dict.fromkeys((errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
                     errno.ENAMETOOLONG), 'choose another path'),
    errno.ENOENT: 'check the path',
}
#: What is said of a config whose object cannot be built: of its type, or of its settings.
_UNKNOWN_TYPE = re.compile(r'is not in the \S+ registry')
_UNKNOWN_SETTING = re.compile(r'__init__\(\) (got an unexpected|missing \d+ required)')


def explained(error: BaseException) -> str:
    """What an error says, for a user: the file, its fault and what to do.

    Args:
        error: Any error; only of the system's own the text is changed.
    """
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None
             and not isinstance(name, int)]
    where = ' and '.join(files) or 'a file could not be read or written'
    remedy = _REMEDIES.get(error.errno)
    fault = error.strerror[0].lower() + error.strerror[1:]
    return f'{where}: {fault}' + (f'; {remedy}' if remedy else '')


def _is_of_a_config(error: Exception) -> bool:
    """Whether MMEngine could not build an object as the config describes it."""
    if isinstance(error, KeyError):
        return _UNKNOWN_TYPE.search(explained(error)) is not None
    builders = ('build_from_cfg', 'build_dataloader', 'build_train_loop')
    return (isinstance(error, TypeError) and _UNKNOWN_SETTING.search(str(error)) is not None
            and any(frame.f_code.co_name in builders
                    for frame, _ in traceback.walk_tb(error.__traceback__)))


def run_tool(main: Callable[[], int | None], *more: type[Exception]) -> NoReturn:
    """Run a tool and end the process; what a user can mend is said without a traceback.

    That is: `UserError`, what the system says of a file, a package that is
    missing, and a config whose objects MMEngine cannot build.

    Args:
        main: Returns the exit code; None is 0.
        more: Further errors that are the user's.

    Raises:
        SystemExit: Always, if no other error is met. The code is 1 after an
            error, 130 after an interrupt by the keyboard.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        code = 130
    except Exception as error:
        if not isinstance(error, (UserError, OSError, ImportError, *more)) and not (
                _is_of_a_config(error)):
            raise
        print(f'error: {explained(error)}', file=sys.stderr)
        code = 1
    sys.exit(code)


def shortened(names: Sequence[str]) -> str:
    """Join names for a message.

    Args:
        names: At least one.

    Returns:
        The first five, and how many there are besides.
    """
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(names[:5]) + more
