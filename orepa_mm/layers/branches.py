"""What the branches of a layer do: how alike their kernels are, and what each adds to the sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .dbb import DBBConv2d
from .orepa import Branched


def branched_layers(model: nn.Module) -> Iterator[tuple[str, Branched | DBBConv2d]]:
    """Every layer that tells its branches apart, by `branch_names` and `branch_kernels`.

    A stem is a chain, not a sum: the generators inside it are listed in its place.

    Args:
        model: Any module; it may be such a layer itself, whose name is then empty.

    Yields:
        Name in the model and layer, in the model's order, once each.
    """
    for name, module in model.named_modules():
        if isinstance(module, (Branched, DBBConv2d)):
            yield name, module


def similarities(branches: Mapping[str, Tensor]) -> Tensor:
    """Cosine similarity between the kernels of every two branches.

    Args:
        branches: By name, from `branch_kernels`, `(o, i, k, k)` each; one at least.

    Returns:
        `(n, n)`, symmetric, from -1 to 1. A branch that is zero has no
        direction: its row and column are NaN.
    """
    kernels = _flat(branches)
    directions = kernels / torch.linalg.vector_norm(kernels, dim=1, keepdim=True)
    return directions @ directions.T


def mean_similarity(matrix: Tensor) -> Tensor:
    """Mean absolute similarity of different branches; those without direction are left out.

    Args:
        matrix: From `similarities`, `(n, n)`.

    Returns:
        A scalar; NaN if no two branches have a direction.
    """
    same = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.abs().masked_fill(same, torch.nan).nanmean()


def shares(branches: Mapping[str, Tensor]) -> Tensor:
    """Share of every branch in the kernel that they sum to.

    The part of a branch that lies along the sum `W`, `<B, W> / <W, W>`. Shares
    sum to 1; one is negative where a branch works against the sum, and zero
    where a branch is zero.

    Args:
        branches: By name, from `branch_kernels`, `(o, i, k, k)` each; one at least.

    Returns:
        `(n,)`; NaN if the sum is zero.
    """
    kernels = _flat(branches)
    total = kernels.sum(0)
    return kernels @ total / (total @ total)


def relative_norms(branches: Mapping[str, Tensor]) -> Tensor:
    """Norm of every branch over that of the kernel that they sum to.

    Larger than the share by how far a branch points elsewhere. Where all are
    large, branches cancel each other.

    Args:
        branches: By name, from `branch_kernels`, `(o, i, k, k)` each; one at least.

    Returns:
        `(n,)`; NaN or infinite if the sum is zero.
    """
    kernels = _flat(branches)
    return (torch.linalg.vector_norm(kernels, dim=1)
            / torch.linalg.vector_norm(kernels.sum(0)))


def _flat(branches: Mapping[str, Tensor]) -> Tensor:
    """`(n, o i k k)`."""
    return torch.stack([kernel.flatten() for kernel in branches.values()])
