"""What a model costs: parameters, multiply-adds, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of parameter values, trainable or not.

    Args:
        model: Any module.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(function: Callable[[], object]) -> int:
    """Multiply-adds of all convolutions and matrix products that a call does.

    This is what OpenMMLab's tables call FLOPs. PyTorch counts a multiply-add
    as two.

    Args:
        function: Called once, without gradients.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def measure_latency(functions: Mapping[str, Callable[[], object]], repeats: int = 20,
                    warmup: int = 3) -> dict[str, float]:
    """Median duration of several calls, taken in turns so that all see the same machine.

    Args:
        functions: What to time, by name.
        repeats: Timed rounds.
        warmup: Rounds before them that are not timed.

    Returns:
        Median duration of each in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(warmup + repeats):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if round_number >= warmup:
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark_backbone(backbone_cfg: dict, input_shape: tuple[int, int, int, int],
                       repeats: int = 10) -> dict[str, float]:
    """Time an OREPA backbone against the stock one that it becomes, in one run.

    Args:
        backbone_cfg: Config of an OREPA backbone.
        input_shape: `(N, 3, H, W)`.
        repeats: Timed rounds.

    Returns:
        Median durations in milliseconds of a training step (forward and
        backward) and of inference, of both.
    """
    cfg = {**backbone_cfg, 'init_cfg': None}
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    forms = {'OREPA': MODELS.build(cfg).to(device),
             'stock': MODELS.build({**cfg, 'deploy': True}).to(device)}
    x = torch.randn(input_shape, device=device)

    def train_step(backbone: nn.Module) -> None:
        backbone.train()
        sum(feature.mean() for feature in backbone(x)).backward()
        backbone.zero_grad(set_to_none=True)

    def infer(backbone: nn.Module) -> None:
        with torch.no_grad():
            backbone(x)

    result = measure_latency(
        {f'{name} training step': partial(train_step, backbone)
         for name, backbone in forms.items()}, repeats)
    for backbone in forms.values():
        backbone.eval()
    return {**result, **measure_latency(
        {f'{name} inference': partial(infer, backbone)
         for name, backbone in forms.items()}, repeats)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
