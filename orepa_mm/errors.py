"""The errors that a user may see: something given to the package is not what it needs."""


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
