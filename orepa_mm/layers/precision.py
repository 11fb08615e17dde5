"""Full precision: where autocast, TF32 or bfloat16 would spoil a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_BACKENDS = torch.backends
#: Each backend's own setting for one kind of operation; earlier releases have `allow_tf32` only.
_MATMUL: list[Any] = [_BACKENDS.cuda.matmul, getattr(_BACKENDS.mkldnn, 'matmul', None)]
_CONVOLUTION = [setting for setting in (
    getattr(_BACKENDS.cudnn, 'conv', None), getattr(_BACKENDS.cudnn, 'rnn', None),
    getattr(_BACKENDS.mkldnn, 'conv', None)) if hasattr(setting, 'fp32_precision')]
_HAS_PRECISION = hasattr(_BACKENDS.cuda.matmul, 'fp32_precision')


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 as float32 everywhere, and the same way each time.

    TF32 and bfloat16 inside of float32 operations are switched off for matrix
    products and convolutions, and cuDNN's search for the fastest algorithm, which
    takes another one from run to run. Whatever was set before is there again
    afterwards, by whichever of PyTorch's interfaces it was set. The switches are those of
    the process: for comparisons, not for a forward pass, which other threads may run beside.
    """
    benchmark = _BACKENDS.cudnn.benchmark
    _BACKENDS.cudnn.benchmark = False
    try:
        with _switched([setting for setting in _MATMUL if setting is not None]
                       + (_CONVOLUTION if _HAS_PRECISION else [_BACKENDS.cudnn])):
            yield
    finally:
        _BACKENDS.cudnn.benchmark = benchmark


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in the types that are given, on one kind of device.

    Args:
        device: Where it is computed.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's and many NPUs do not.

    Args:
        device: The device.
    """
    if device.type in ('cpu', 'cuda', 'meta'):
        return True
    try:
        torch.ones(1, device=device).double()
    except (RuntimeError, TypeError):
        return False
    return True


@contextlib.contextmanager
def _switched(settings: Sequence[Any]) -> Iterator[None]:
    name, exact = ('fp32_precision', 'ieee') if _HAS_PRECISION else ('allow_tf32', False)
    settings = [setting for setting in settings if hasattr(setting, name)]
    before = [getattr(setting, name) for setting in settings]
    try:
        for setting in settings:
            setattr(setting, name, exact)
        yield
    finally:
        for setting, value in zip(settings, before):
            setattr(setting, name, value)
