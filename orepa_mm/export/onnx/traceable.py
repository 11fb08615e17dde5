"""What PyTorch's exporter cannot trace, as something that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .graphs import named_tensors


class TracedGraph(nn.Module):
    """A module of one function of a model, which returns nothing but tensors."""

    def __init__(self, model: nn.Module, function: Callable) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the function, in the order of their names in `named_tensors`."""
        return tuple(named_tensors(self.function(self.model, inputs)).values())


class DynamicAdaptiveAvgPool2d(nn.Module):
    """The stock layer as two matrix products.

    PyTorch exports the stock layer for the traced size of its input only: a
    graph of dynamic size would be wrong for all others, without an error.
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """Average `(N, C, H, W)` over bins to `(N, C, *output_size)`."""
        height, width = self.output_size
        return self._averages(x, 2, height) @ x @ self._averages(x, 3, width).T

    @staticmethod
    def _averages(x: Tensor, dim: int, bins: int) -> Tensor:
        """The matrix `(bins, length)` that averages: bins may overlap by one, as in PyTorch."""
        length = x.shape[dim]
        index = torch.arange(bins, device=x.device)[:, None]
        position = torch.arange(length, device=x.device)[None]
        inside = (position >= index * length // bins) & (
            position < ((index + 1) * length + bins - 1) // bins)
        inside = inside.to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


def make_traceable(model: nn.Module) -> None:
    """Replace, in place, what the exporter cannot trace by what computes the same."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.AdaptiveAvgPool2d:
                size = child.output_size
                size = (size, size) if isinstance(size, int) else tuple(size)
                if None not in size and size != (1, 1):
                    module._modules[name] = DynamicAdaptiveAvgPool2d(size)
    if not hasattr(model, 'roi_head'):
        return
    from mmcv.ops import RoIAlign
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    for module in model.modules():
        if isinstance(module, RoIAlign) and module.pool_mode == 'avg':
            module.use_torchvision = True  # the same function, with an ONNX counterpart
        elif type(module) is SingleRoIExtractor:
            module.forward = MethodType(_extract_rois, module)


def _extract_rois(self: Any, feats: Sequence[Tensor], rois: Tensor,
                  roi_scale_factor: float | None = None) -> Tensor:
    """`SingleRoIExtractor.forward` without asking whether a level has any RoI."""
    levels = self.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = self.roi_rescale(rois, roi_scale_factor)
    pooled = feats[0].new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
    for level, (layer, features) in enumerate(zip(self.roi_layers, feats)):
        index = (levels == level).nonzero().squeeze(1)
        pooled = pooled.index_copy(0, index, layer(features, rois[index]))
    return pooled
