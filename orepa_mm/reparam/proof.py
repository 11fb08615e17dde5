"""Whether two modules compute the same, each on random input of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ..layers.precision import has_float64
from .copies import own_copy

#: Sizes of images that whole networks take.
_IMAGES = (64, 224)
#: Largest number of values of one sample that is tried.
_LARGEST = 2 ** 21


def exact(module: nn.Module) -> torch.dtype | None:
    """Float64, if a module has values and its device has that dtype; else None, its own dtype.

    Args:
        module: Any module.
    """
    reference = _reference(module)
    return torch.float64 if reference is not None and not reference.is_meta and has_float64(
        reference.device) else None


def stays_same(module: nn.Module, change: Callable[[nn.Module], object]) -> bool:
    """Whether a module computes the same after a change of it, or runs on no random input.

    With BN and biases drawn at random: a fresh one commutes with much, and what can be changed
    shall not depend on what was trained.

    Args:
        module: Left as it is.
        change: Is called with a copy.
    """
    if type(module) is nn.Sequential:  # calls its children in their order
        return True
    before = own_copy(module)
    if exact(module) is not None:
        before.double()
    generator = torch.Generator().manual_seed(0)
    for part in before.modules():
        part.training = False
        drawn = {_BatchNorm: ('running_mean', 'running_var', 'weight', 'bias'),
                 nn.Conv2d: ('bias',)}
        for tensor in (getattr(part, name) for kind, names in drawn.items()
                       if isinstance(part, kind) for name in names):
            if tensor is not None:
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    after = own_copy(before)
    with torch.no_grad():
        change(after)
    error = difference(before, after)
    return error is None or within(error, exact(module))


def within(error: float, dtype: torch.dtype | None) -> bool:
    """Whether a difference is rounding.

    Args:
        error: See `difference`.
        dtype: In which it was found, see `exact`.
    """
    return error <= (1e-9 if dtype is torch.float64 else 1e-4)


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module) -> float | None:
    """How far the outputs of two modules are apart, on the first random input that runs.

    Args:
        before: In eval mode; what it takes is guessed from its layers.
        after: In eval mode, of the same dtype, on the same device.

    Returns:
        Largest absolute difference over the largest absolute value of the same
        output; infinite if `after` does not run or gives other outputs. None if
        `before` runs on no input.
    """
    for x in _inputs(before):
        try:
            expected = _run(before, x)
        except Exception:  # whatever a block does with what it does not take
            continue
        if not expected or not all(y.isfinite().all() for y in expected):
            continue
        try:
            found = _run(after, x)
        except Exception:
            return math.inf
        if [y.shape for y in found] != [y.shape for y in expected]:
            return math.inf
        return max(_error(y, other) for y, other in zip(expected, found) if y.numel())
    return None


def _error(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double(), found.double()
    off, scale = (tensor.abs().max().item() for tensor in (expected - found, expected))
    return off / scale if scale else off and math.inf


def _reference(module: nn.Module) -> Tensor | None:
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _run(module: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.random.fork_rng([x.device] if x.device.type == 'cuda' else []):
        torch.manual_seed(0)
        outputs = tree_leaves(module(x.clone()))
    return [y for y in outputs if isinstance(y, Tensor) and y.is_floating_point()]


def _inputs(module: nn.Module) -> Iterator[Tensor]:
    """Maps, then images, vectors and tokens, of as many channels as its first layers take."""
    reference = _reference(module)
    if reference is None or reference.is_meta:
        return
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x[1:] *= 8  # what saturates, and the bias of what does not
        return x.to(reference.device, reference.dtype)

    layers = list(module.modules())
    channels = list(dict.fromkeys(
        size for layer in layers for size in (
            layer.in_channels if isinstance(layer, nn.modules.conv._ConvNd) else
            layer.num_features if isinstance(layer, _BatchNorm) else
            layer.in_features if isinstance(layer, nn.Linear) else None,) if size))
    declared = [getattr(module, name, None) for name in ('in_channels', 'in_chs', 'in_dim', 'dim')]
    channels = [size for size in dict.fromkeys([*declared, *channels[:4]])
                if isinstance(size, int) and size > 0]
    window = max((dilation * (size - 1) + 1 for layer in layers
                  if isinstance(layer, nn.modules.conv._ConvNd)
                  for size, dilation in zip(layer.kernel_size, layer.dilation)), default=1)
    sizes = [max(9, window), *_IMAGES]
    for count in channels:
        for size in (_IMAGES if count <= 4 else sizes[:1]):
            yield draw(2, count, size, size)
    for count in channels:
        yield draw(2, count)
        yield draw(2, 16, count)
        for size in _IMAGES:
            if count * size * size <= _LARGEST:
                yield draw(2, count, size, size)
