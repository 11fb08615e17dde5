"""Constants of a layer: buffers that are not saved, and stay float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .precision import has_float64


class WithConstants(nn.Module):
    """A module whose squeeze needs constants beside its parameters.

    They are buffers, so that they move with the module and a forward pass makes
    no tensor. They are float32 also where the parameters are of half precision,
    which would round them. Checkpoints do not hold them; one that does, an older
    one or one of the authors, must hold the same values.
    """

    #: `device` and `dtype` of the parameters.
    _factory_kwargs: dict[str, Any]

    def _reference(self) -> Tensor:
        """A branch parameter: its dtype and device are those of the layer."""
        raise NotImplementedError

    def _exact_device(self) -> torch.device:
        """Where the squeeze in float64 runs: the CPU, if the device of the layer has none."""
        device = self._reference().device
        return device if has_float64(device) else torch.device('cpu')

    def _make_constants(self) -> dict[str, Tensor]:
        """The constants in float32, on the CPU, by name of their buffers."""
        return {}

    def _register_constants(self) -> None:
        # before PyTorch 2.7 torch.get_default_device() does not know of `with torch.device(...)`
        device = self._factory_kwargs['device'] or torch.empty(0).device
        for name, constant in self._make_constants().items():
            self.register_buffer(name, constant.to(device), persistent=False)

    def _constants(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._buffers.items()
                if buffer is not None and name in self._non_persistent_buffers_set}

    def _restore(self, constants: dict[str, Tensor]) -> None:
        """Put constants where the parameters are."""
        if not constants:
            return
        device = self._reference().device
        if any(constant.is_meta for constant in constants.values()) and device.type != 'meta':
            constants = self._make_constants()
        for name, constant in constants.items():
            self._buffers[name] = constant.to(device)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        constants = self._constants()
        super()._apply(fn, *args, **kwargs)
        self._restore(constants)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        constants = self._constants()
        for name, own in constants.items():
            stored = state_dict.get(prefix + name)
            if stored is not None and not _same(stored, own):
                raise CheckpointError(
                    f'{prefix}{name} of the checkpoint is not the constant that '
                    f'{type(self).__name__} has there (shape {tuple(own.shape)}): it was written '
                    'by another definition of the block, and would compute something else')
        super()._load_from_state_dict(
            {key: value for key, value in state_dict.items()
             if key.removeprefix(prefix) not in constants}, prefix, *args)
        self._restore(constants)


def _same(stored: Tensor, own: Tensor) -> bool:
    """Whether a stored constant is ours, up to the precision in which it is stored."""
    if stored.shape != own.shape:
        return False
    if stored.is_meta or own.is_meta:
        return True
    tolerance = max(1e-5, 2 * torch.finfo(stored.dtype).eps) if stored.is_floating_point() else 0
    return torch.allclose(stored.detach().cpu().float(), own.detach().cpu(), 0, tolerance)
