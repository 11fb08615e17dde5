"""Full precision: where autocast, TF32 or bfloat16 would spoil a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: What PyTorch 2.9 and later call exact, and what says that nothing else was asked for.
_EXACT = ('ieee', 'none')
_BACKENDS = torch.backends
#: Each backend's own setting for one kind of operation; earlier releases have `allow_tf32` only.
_MATMUL: dict[str, Any] = {'cuda': _BACKENDS.cuda.matmul,
                           'cpu': getattr(_BACKENDS.mkldnn, 'matmul', None)}
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
    afterwards, by whichever of PyTorch's interfaces it was set.
    """
    benchmark = _BACKENDS.cudnn.benchmark
    _BACKENDS.cudnn.benchmark = False
    try:
        with _switched([setting for setting in _MATMUL.values() if setting is not None]
                       + (_CONVOLUTION if _HAS_PRECISION else [_BACKENDS.cudnn])):
            yield
    finally:
        _BACKENDS.cudnn.benchmark = benchmark


def exact_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Multiply matrices in float32 at least: no autocast, no TF32, on one kind of device.

    A graph that is being compiled keeps the precision that the user set.

    Args:
        device: Where the factors lie.
    """
    setting = None if torch.compiler.is_compiling() else _MATMUL.get(device.type)
    context = without_autocast(device)
    # the usual case costs little: it comes with every layer of every step
    return context if setting is None or _is_exact(setting) else _switched([setting], context)


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


def _is_exact(setting: Any) -> bool:
    if _HAS_PRECISION:
        return getattr(setting, 'fp32_precision', 'none') in _EXACT
    return not getattr(setting, 'allow_tf32', False)


@contextlib.contextmanager
def _switched(settings: Sequence[Any],
              inside: contextlib.AbstractContextManager[Any] | None = None) -> Iterator[None]:
    name, exact = ('fp32_precision', 'ieee') if _HAS_PRECISION else ('allow_tf32', False)
    settings = [setting for setting in settings if hasattr(setting, name)]
    before = [getattr(setting, name) for setting in settings]
    try:
        for setting in settings:
            setattr(setting, name, exact)
        with inside or contextlib.nullcontext():
            yield
    finally:
        for setting, value in zip(settings, before):
            setattr(setting, name, value)
