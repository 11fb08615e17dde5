"""Let the runner's own checkpoints pass `torch.load(weights_only=True)`.

MMEngine stores its training log in every checkpoint, as `HistoryBuffer`s that
hold NumPy arrays. PyTorch refuses them since 2.6. Exactly what they consist of
is allowed here, and nothing else.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

#: The methods by which a `HistoryBuffer` refers to its own statistics.
_STATISTICS = frozenset({'min', 'max', 'current', 'mean'})


def _getattr_of_history_buffer(owner: Any, name: str) -> Any:
    """Stand in for `builtins.getattr` in a checkpoint: `HistoryBuffer`'s statistics only.

    Plain `getattr` would let a crafted file reach any attribute of any object.
    """
    if owner is HistoryBuffer and isinstance(name, str) and name in _STATISTICS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'the checkpoint asks for attribute {name!r} of {owner!r}, '
                                 'which no runner writes: it is refused')


def allow_runner_checkpoints() -> None:
    """Add what the runner's checkpoints consist of to PyTorch's allowlist.

    Loading stays safe (`weights_only`). Called once, on `import orepa_mm`.
    """
    try:
        from numpy._core import multiarray
    except ImportError:  # NumPy before 1.26
        from numpy.core import multiarray  # type: ignore[no-redef]  # the same, by its older name
    reconstruct, scalar = multiarray._reconstruct, multiarray.scalar
    torch.serialization.add_safe_globals([
        HistoryBuffer, np.ndarray, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.int64)),
        (_getattr_of_history_buffer, 'builtins.getattr'),
        (reconstruct, 'numpy._core.multiarray._reconstruct'),
        (scalar, 'numpy._core.multiarray.scalar'),
        # files written under NumPy 1
        (reconstruct, 'numpy.core.multiarray._reconstruct'),
        (scalar, 'numpy.core.multiarray.scalar'),
    ])
