"""What the branches do while they are trained: how alike they are, and what each adds."""

from __future__ import annotations

import logging
import math

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..layers import branched_layers, mean_similarity, shares, similarities
from .interval_hook import IntervalHook
from .launch import bare_model


@HOOKS.register_module()
class BranchSimilarityHook(IntervalHook):
    """Log how alike the branches are and what each adds, through the run's visualizer.

    `branch_similarity`: the absolute cosine similarity of the scaled kernels of
    two branches, a mean over all pairs of a layer and then over the layers; a
    branch that is zero is left out. `branch_share/NAME`: the share of a branch
    in the squeezed kernel, a mean over the layers that have one of that name;
    see `orepa_mm.layers.shares`. Frozen layers take part.

    Only the main process measures. It squeezes every layer once per branch, in
    float64, and waits for the device once, at the measured iterations only.
    With a model without branches it does nothing: variants of a config can keep it.

    Args:
        interval: Every how many iterations one is measured.

    Raises:
        ValueError: If `interval` is no positive integer.

    Example:
        >>> custom_hooks = [dict(type='BranchSimilarityHook', interval=500)]
    """

    def __init__(self, interval: int = 500) -> None:
        super().__init__(interval)

    def before_train(self, runner: Runner) -> None:
        """Warn if there is nothing to measure.

        Args:
            runner: The runner.
        """
        if next(branched_layers(bare_model(runner)), None) is None:
            print_log('BranchSimilarityHook: the model has no layer with branches (OREPA or DBB), '
                      'nothing is logged', 'current', logging.WARNING)

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | tuple | list | None = None,
                         outputs: dict | None = None) -> None:
        """Log what the branches do if this iteration is measured.

        Args:
            runner: The runner.
            batch_idx: Not used.
            data_batch: Not used.
            outputs: Not used.
        """
        if self.measures(runner) and is_main_process():
            scalars = _measured(bare_model(runner))
            if scalars:
                runner.visualizer.add_scalars(scalars, step=runner.iter + 1)


def _measured(model: nn.Module) -> dict[str, float]:
    """Means over all layers, by tag; one that is not defined is left out."""
    found: dict[str, list[torch.Tensor]] = {}
    for _, layer in branched_layers(model):
        kernels = layer.branch_kernels()
        found.setdefault('branch_similarity', []).append(mean_similarity(similarities(kernels)))
        for name, share in zip(kernels, shares(kernels)):
            found.setdefault(f'branch_share/{name}', []).append(share)
    if not found:
        return {}
    means = torch.stack([torch.stack(values).nanmean() for values in found.values()])
    # scalars.json would be no JSON with NaN
    return {tag: mean for tag, mean in zip(found, means.tolist()) if math.isfinite(mean)}
