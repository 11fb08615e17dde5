"""What a run says on the console: the file of its log has everything."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

#: How messages begin that are long, or that nobody can act on; they are in the log file.
_LONG = ('\n' + '-' * 60 + '\nSystem environment:', 'Config:\n',
         'Hooks will be executed in the following order:', 'paramwise_options -- ',
         '"FileClient" will be deprecated', '"HardDiskBackend" is the alias')


def runner_class(cfg: Config) -> type[Runner]:
    """The class of a config's runner, with a short console.

    Environment, config, hooks and options of single parameters go into the log
    file only. A log file that cannot be written ends the run, as checkpoints do.

    Args:
        cfg: Any config.
    """
    base = cfg.get('runner_type', Runner)
    if isinstance(base, str):
        name, base = base, RUNNERS.get(base)
        if base is None:
            raise KeyError(f'{name} is not in the {RUNNERS.name} registry')
    return type(base.__name__, (_ShortConsole, base), {'__module__': base.__module__})


class _ShortConsole:
    """Comes before a runner's class."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _ending(handler)
                logger.info(f'the whole log, with environment, config and hooks: '
                            f'{handler.baseFilename}')
            elif not any(isinstance(found, _Short) for found in handler.filters):
                handler.addFilter(_Short())
        return logger


class _Short(logging.Filter):
    """Keeps long messages from the console."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_LONG)


def _ending(handler: logging.FileHandler) -> Callable[[logging.LogRecord], None]:
    """What to do in a handler that could not write: stop, if the file is to blame."""
    stock = handler.handleError

    def handle(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, handler.baseFilename) from error
        stock(record)

    return handle
