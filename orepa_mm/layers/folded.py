"""What is left of a BN that is folded into the convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FoldedNorm(nn.Identity):
    """What is left of a BN that is folded: a key by which weights tell that they are.

    Without it, they might be those of any network without BN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('folded_norm', torch.tensor(True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # files of version 0.2.0 have no such key; PyTorch's caller gives a copy
        state_dict.setdefault(f'{prefix}folded_norm', self.folded_norm)
        super()._load_from_state_dict(state_dict, prefix, *args)
