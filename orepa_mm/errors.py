"""The errors that a user may see: something given to the package is not what it needs."""

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint is not what was asked for; the message says what it is."""


class ConfigError(ValueError):
    """A config lacks what was asked of it; the message says what."""


class DataRootError(ValueError):
    """A folder is not laid out as the config expects; the message says how it is."""


class NothingToConvertError(ValueError):
    """A model has no layer to re-parameterize, and none was converted before."""


class VerificationError(RuntimeError):
    """Two forms differ: nothing was saved. The message says where and how much."""


class OnnxExportError(RuntimeError):
    """A model has no ONNX form; the message says why."""


def shortened(names: Sequence[str]) -> str:
    """Join names for a message.

    Args:
        names: At least one.

    Returns:
        The first five, and how many there are besides.
    """
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(names[:5]) + more
