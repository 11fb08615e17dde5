"""Where and how something was measured."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ..backbones.registration import PACKAGES
from ..version import __version__


def conditions(device: torch.device, package: str | None = None) -> dict[str, Any]:
    """What a measurement depends on beside the model: plain types, for a file.

    Args:
        device: Where it was measured.
        package: The toolbox that built the model, whose version is named; any
            other name is passed over.

    Returns:
        `device`, `processor`, `threads` and `versions`.
    """
    names = ('mmengine', 'mmcv', *([package] if package in PACKAGES and find_spec(package)
                                   else []))
    return {'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU',
            'processor': _processor(), 'threads': torch.get_num_threads(),
            'versions': {'orepa_mm': __version__, 'torch': torch.__version__,
                         **{name: import_module(name).__version__ for name in names}}}


def config_title(cfg: Config) -> str:
    """What a measurement of a config is called: the name of its file.

    Args:
        cfg: Any config.
    """
    return Path(cfg.filename or 'model').stem


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError):
            for line in Path('/proc/cpuinfo').read_text().splitlines():
                if line.startswith('model name'):
                    return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()
