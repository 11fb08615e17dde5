"""The same selection by score in both forms of a model, whatever rounding makes of the order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SameSelection(TorchFunctionMode):
    """Let a model select by score what another form of it selected.

    A DETR in two stages takes the places of the highest scores as queries; scores that differ by
    rounding may come in another order. As a context around a model it notes the indices that
    `torch.topk` gives; given what such a context noted, it takes these, with the values that the
    model itself has there. The scores are to be compared as any other output.

    Args:
        before: Around the form whose selection is taken; None for that form itself.
    """

    def __init__(self, before: SameSelection | None = None) -> None:
        super().__init__()
        self.before = before
        #: Of each call, in order: what was selected, and from what.
        self.indices: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in (torch.topk, Tensor.topk) or kwargs.get('out') is not None:
            return result
        scores = args[0] if args else kwargs['input']
        dim = args[2] if len(args) > 2 else kwargs.get('dim', -1)
        indices, number = result[1], len(self.indices)
        if self.before is not None and number < len(self.before.indices):
            theirs = self.before.indices[number]
            if theirs.shape == indices.shape and self.before.scores[number].shape == scores.shape:
                indices = theirs.to(indices.device)
        self.indices.append(indices)
        self.scores.append(scores.clone())  # they may be written over
        return torch.return_types.topk((scores.gather(dim, indices), indices))
