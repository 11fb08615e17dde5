"""Messages: to MMEngine's logger where MMEngine is in use, otherwise to `logging`."""

from __future__ import annotations

import logging
import sys


def log(message: str, level: int = logging.INFO) -> None:
    """Log a message.

    Args:
        message: One line or more.
        level: As of `logging`.
    """
    if sys.modules.get('mmengine') is not None:
        from mmengine.logging import print_log
        print_log(message, 'current', level)
    else:
        logging.getLogger('orepa_mm').log(level, message)
