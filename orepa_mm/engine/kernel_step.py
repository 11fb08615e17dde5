"""How far training moves a kernel: the axis on which learning rates of two networks compare."""

from __future__ import annotations

import math

import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..layers import ReparamConv2d
from .interval_hook import IntervalHook
from .launch import bare_model


@HOOKS.register_module()
class KernelStepHook(IntervalHook):
    """Log the relative step of the kernels, `kernel_step`: norm of the change over the norm.

    The mean over all convolutions of the norm of what one iteration changes in
    the kernel, over the norm of that kernel. A kernel that is followed by a BN
    computes the same at any scale, so this tells how fast it turns; and a
    generated kernel moves by the sum of what its branches move. It has the same
    meaning for a plain network and for one in training form. A kernel of zeros is
    left out. Where gradients are accumulated, measure iterations that end with a
    step: `interval` a multiple of `accumulative_counts`.

    Needed while it runs: memory for every kernel, at the measured iterations
    only; their device is waited for once.

    Args:
        interval: Every how many iterations one is measured.

    Raises:
        ValueError: If `interval` is no positive integer.

    Example:
        >>> custom_hooks = [dict(type='KernelStepHook', interval=50)]
    """

    def __init__(self, interval: int = 50) -> None:
        super().__init__(interval)
        self._before: list[Tensor] = []

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | tuple | list | None = None) -> None:
        """Keep the kernels if this iteration is measured.

        Args:
            runner: The runner.
            batch_idx: Not used.
            data_batch: Not used.
        """
        if self.measures(runner):
            self._before = _kernels(bare_model(runner))

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | tuple | list | None = None,
                         outputs: dict | None = None) -> None:
        """Log how far the kernels have moved if this iteration is measured.

        Args:
            runner: The runner.
            batch_idx: Not used.
            data_batch: Not used.
            outputs: Not used.
        """
        if not self._before:
            return
        steps = torch.stack([
            torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before)
            for before, after in zip(self._before, _kernels(bare_model(runner)))])
        self._before = []
        # of a kernel of zeros, which has no direction, there is no relative step
        step = steps.masked_fill(~steps.isfinite(), torch.nan).nanmean().item()
        if math.isfinite(step):
            runner.message_hub.update_scalar('train/kernel_step', step)


@torch.no_grad()
def _kernels(model: nn.Module) -> list[Tensor]:
    """The kernel of every convolution that is trained, in float32."""
    found: list[Tensor] = []

    def walk(module: nn.Module) -> None:
        if isinstance(module, (ReparamConv2d, nn.Conv2d)):
            if any(parameter.requires_grad for parameter in module.parameters()):
                kernel = (module.squeeze(torch.float32) if isinstance(module, ReparamConv2d)
                          else module.weight)
                found.append(kernel.detach().float().clone())
            return
        for child in module.children():
            walk(child)

    walk(model)
    return found
