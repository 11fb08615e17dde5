"""What the package says while it works: through MMEngine's logger if that is loaded."""

from __future__ import annotations

import logging
import sys


def log(message: str, level: int = logging.INFO) -> None:
    """Log a line.

    Args:
        message: The line.
        level: As of `logging`.
    """
    engine = sys.modules.get('mmengine.logging')
    if engine is not None:
        engine.print_log(message, 'current', level)
    else:
        logging.getLogger('orepa_mm').log(level, message)
