"""How the weights of each convolution spread, before and after re-parameterization.

Integers of 8 bits represent a tensor well whose values fill their range
evenly. A few values far outside, or output channels of very different range
under one common scale, leave most values only a few of the 255 steps. Adding
up branches and folding BN change both; these numbers show where.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ReparamConv2d

#: Largest step of symmetric int8: the range is -127 to 127.
_STEPS = 127


@dataclass(frozen=True)
class WeightRange:
    """The spread of the weights of one convolution layer in one form of the model.

    Attributes:
        layer: Name of the layer in the deployed model.
        form: `training` (all branch kernels together, as they are stored),
            `deployed` (the squeezed kernel), `folded` (with BN folded into it).
        reparameterized: Whether the layer had branches; others change by
            folding only.
        count: Number of weights.
        minimum: Smallest weight.
        maximum: Largest weight.
        std: Standard deviation.
        outlier_ratio: Largest absolute value over the standard deviation.
        channel_ratio_median: Range of the output channel with the largest
            one, over the median of all; the range is the largest absolute value.
        channel_ratio_smallest: The same over the smallest of all; infinite if
            a channel is zero.
        sqnr_tensor_db: Signal-to-quantization-noise ratio of int8 in dB, one
            scale per tensor, see `int8_sqnr`.
        sqnr_channel_db: The same with one scale per output channel.
    """

    layer: str
    form: str
    reparameterized: bool
    count: int
    minimum: float
    maximum: float
    std: float
    outlier_ratio: float
    channel_ratio_median: float
    channel_ratio_smallest: float
    sqnr_tensor_db: float
    sqnr_channel_db: float

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(abs(self.minimum), abs(self.maximum))


def weight_ranges(training: nn.Module, deployed: nn.Module, folded: nn.Module
                  ) -> list[WeightRange]:
    """Describe the weights of every convolution in three forms of a model.

    Args:
        training: The model in training form.
        deployed: The same re-parameterized.
        folded: The same with BN folded as well.

    Returns:
        Three entries per `nn.Conv2d` of the deployed model, in its order.
    """
    convs = {name: module for name, module in deployed.named_modules()
             if isinstance(module, nn.Conv2d)}
    ranges = []
    for name, conv in convs.items():
        branches, reparameterized = _branches(training, name, convs.keys())
        for form, tensors in (('training', branches), ('deployed', [conv.weight]),
                              ('folded', [folded.get_submodule(name).weight])):
            ranges.append(WeightRange(name, form, reparameterized, **describe_weights(tensors)))
    return ranges


@torch.no_grad()
def describe_weights(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The statistics of a `WeightRange`, over all values of several tensors together.

    Args:
        tensors: One kernel, or the kernels of all branches, each with its
            output channels first; a tensor is quantized by itself.

    Returns:
        The fields of `WeightRange` from `count` on, by name.
    """
    rows = [tensor.detach().double().flatten(1).cpu() for tensor in tensors]
    values = torch.cat([row.flatten() for row in rows])
    channels = torch.cat([row.abs().amax(1) for row in rows])
    std = values.std(correction=0).item()
    largest = channels.max().item()
    return dict(
        count=values.numel(), minimum=values.min().item(), maximum=values.max().item(), std=std,
        outlier_ratio=_ratio(largest, std),
        channel_ratio_median=_ratio(largest, channels.quantile(0.5).item()),
        channel_ratio_smallest=_ratio(largest, channels.min().item()),
        sqnr_tensor_db=int8_sqnr(tensors), sqnr_channel_db=int8_sqnr(tensors, per_channel=True))


@torch.no_grad()
def int8_sqnr(tensors: Sequence[Tensor], per_channel: bool = False) -> float:
    """Signal-to-quantization-noise ratio of weights in symmetric int8.

    `10 log10(sum w^2 / sum (w - q(w))^2)` with `q(w) = s round(w / s)` and
    `s = max |w| / 127`: standard post-training quantization of weights, zero
    point 0. Six dB are one bit.

    Args:
        tensors: Kernels with their output channels first. Each has a scale of
            its own; signal and noise are summed over all of them.
        per_channel: Take one scale per output channel instead.

    Returns:
        Decibels; infinite if nothing is lost.
    """
    signal = noise = 0.0
    for tensor in tensors:
        weight = tensor.detach().float().cpu()
        largest = weight.abs().flatten(1).amax(1) if per_channel else weight.abs().max()
        scale = (largest / _STEPS).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        if per_channel:
            quantized = torch.fake_quantize_per_channel_affine(
                weight, scale, zero, 0, -_STEPS, _STEPS)
        else:
            quantized = torch.fake_quantize_per_tensor_affine(
                weight, scale, zero, -_STEPS, _STEPS)
        signal += weight.double().square().sum().item()
        noise += (weight.double() - quantized.double()).square().sum().item()
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def worst_layers(ranges: Sequence[WeightRange], count: int = 5) -> list[str]:
    """The layers that lose most in int8 with one scale per tensor, BN folded; worst first.

    Args:
        ranges: From `weight_ranges`.
        count: How many.
    """
    folded = sorted((entry.sqnr_tensor_db, entry.layer) for entry in ranges
                    if entry.form == 'folded')
    return [layer for _, layer in folded[:count]]


def write_weight_ranges(ranges: Sequence[WeightRange], path: str | Path) -> None:
    """Write everything as CSV, one line per layer and form.

    Args:
        ranges: From `weight_ranges`.
        path: The file to write.
    """
    with Path(path).open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, [field.name for field in fields(WeightRange)])
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in ranges)


def _branches(training: nn.Module, name: str, plain: Sequence[str]) -> tuple[list[Tensor], bool]:
    """The kernels in training form of a layer of the deployed model, and if they are branches.

    A block that becomes one convolution as a whole (RepVGG) has no layer of
    that name: what it holds beside layers of the deployed model are branches.
    """
    try:
        layer, prefix = training.get_submodule(name), name
    except AttributeError:
        prefix = name.rpartition('.')[0]
        layer = training.get_submodule(prefix)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer, ReparamConv2d):
        return [layer.weight], False
    inside = '' if isinstance(layer, ReparamConv2d) else f'{prefix}.'
    return [parameter for key, parameter in layer.named_parameters()
            if parameter.dim() == 4
            and not (inside and f'{inside}{key}'.rpartition('.')[0] in plain)], True


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.inf
