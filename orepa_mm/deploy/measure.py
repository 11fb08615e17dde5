"""What a model costs: parameters, multiply-adds, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
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
        functions: What to time, by name; each is called without gradients.
        repeats: Timed rounds.
        warmup: Rounds before them that are not timed.

    Returns:
        Median duration of each in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.no_grad():
        for round_number in range(warmup + repeats):
            for name, function in functions.items():
                _synchronize()
                start = time.perf_counter()
                function()
                _synchronize()
                if round_number >= warmup:
                    times[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
