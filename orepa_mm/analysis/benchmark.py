"""Measure what the forms of a config's model cost, all in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..checkpoints import load_weights
from ..errors import ConfigError
from ..export.stock import deploy_config
from ..reparam import reparameterize
from .conditions import conditions
from .measure import Cost, Form, Progress, measure_forms, paired_ratio, time_calls
from .networks import require_training_form
from .weight_ranges import WeightRange, weight_ranges


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark_config` measured.

    Attributes:
        costs: By form: `training`; `deployed`; `folded`, BN as well;
            `stock`, built from the deployed config.
        training_steps_ms: Durations of forward and backward of the backbone in
            `training` and `stock` form; empty without a backbone.
        weight_ranges: From `weight_ranges`.
        conditions: Where and how it was measured; plain types.
    """

    costs: dict[str, Cost]
    training_steps_ms: dict[str, list[float]]
    weight_ranges: list[WeightRange]
    conditions: dict[str, Any]

    @property
    def latency_ratios(self) -> dict[str, float]:
        """Latency of each form over that of the stock one, see `paired_ratio`."""
        stock = self.costs['stock'].latencies_ms
        return {name: paired_ratio(cost.latencies_ms, stock) for name, cost in self.costs.items()}

    @property
    def training_step_ratio(self) -> float | None:
        """Training step in training form over that of the stock one; None without a backbone."""
        times = self.training_steps_ms
        return paired_ratio(times['training'], times['stock']) if times else None

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file; without the weight ranges, which have their own."""
        return {'conditions': self.conditions,
                'forms': {name: {**asdict(cost), 'latency_ms': cost.latency_ms,
                                 'latency_p90_ms': cost.latency_p90_ms,
                                 'latency_over_stock': self.latency_ratios[name]}
                          for name, cost in self.costs.items()},
                'training_steps_ms': self.training_steps_ms,
                'training_step_over_stock': self.training_step_ratio}


def benchmark_config(cfg: Config, checkpoint: str | Path | None = None,
                     input_shape: tuple[int, int, int, int] = (2, 3, 416, 544), rounds: int = 10,
                     warmup: int = 3, progress: Progress | None = None) -> Benchmark:
    """Measure every form of a config's model, on the GPU if there is one.

    Args:
        cfg: A training config, from `orepa_mm.engine.load_config`.
        checkpoint: A checkpoint in training form; without it weights are random.
        input_shape: `(N, 3, H, W)` of the random input.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        progress: Told after every step.

    Raises:
        CheckpointError: If the checkpoint does not belong to the config.
        ConfigError: If the config has no deployed counterpart, or its network
            does not run on such an input.
        FileNotFoundError: If there is no such checkpoint.
        NothingToConvertError: If the model has nothing to re-parameterize.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    models = _models(cfg, checkpoint)
    ranges = weight_ranges(*(models[form] for form in ('training', 'deployed', 'folded')))
    inputs = torch.randn(input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    for model in models.values():
        model.to(device)
    forms = {name: Form(model) for name, model in models.items()}
    try:
        costs = measure_forms(forms, network(models['training'], inputs), inputs, rounds, warmup,
                              progress)
        backbones = {name: models[name].backbone for name in ('training', 'stock')
                     if hasattr(models[name], 'backbone')}
        steps = time_training_steps(backbones, inputs, rounds, warmup, progress)
    except (RuntimeError, ValueError) as error:
        raise ConfigError('the network does not run on an input of shape '
                          f'{" x ".join(map(str, input_shape))}: {error}') from error
    return Benchmark(costs, steps, ranges, {
        **conditions(device, cfg.get('default_scope')),
        'input_shape': list(input_shape), 'rounds': rounds, 'warmup': warmup,
        'weights': 'random' if checkpoint is None else str(checkpoint)})


def network(model: nn.Module, inputs: Tensor) -> Callable[[nn.Module], object]:
    """What is timed: the raw outputs of a network, without selection by score.

    How long the selection of a detector takes depends on how many scores are
    high, so on weights and images, not on the form. A detector with proposals
    therefore runs its heads on fixed random boxes, as many as its test settings
    keep; other models run up to the outputs of their head.

    Args:
        model: An OpenMMLab model or a plain module; all forms of it run alike.
        inputs: `(N, 3, H, W)`, as after the data preprocessor.

    Returns:
        A function that runs a form of the model on `inputs`.
    """
    try:
        from mmdet.models import BaseDetector
        from mmdet.structures import DetDataSample
    except ImportError:  # then it is no detector
        BaseDetector = ()
    if not isinstance(model, BaseDetector):
        return lambda form: form(inputs)  # mode='tensor' in MMSegmentation and MMPretrain
    height, width = inputs.shape[-2:]
    samples = [DetDataSample(metainfo=dict(
        img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
        batch_input_shape=(height, width), scale_factor=(1.0, 1.0))) for _ in inputs]
    selects = getattr(model, 'with_roi_head', False) and (
        not model.with_rpn or hasattr(model.rpn_head, 'rpn_cls'))
    if not selects:  # one stage, or learned queries
        return lambda form: form(inputs, samples, mode='tensor')
    count = model.rpn_head.test_cfg.get('max_per_img', 1000) if model.with_rpn else 1000
    proposals = [InstanceData(bboxes=_boxes(count, height, width).to(inputs.device))
                 for _ in inputs]

    def run(form: nn.Module) -> object:
        features = form.extract_feat(inputs)
        return (form.rpn_head(features) if form.with_rpn else None,
                form.roi_head.forward(features, proposals, samples))

    return run


def time_training_steps(backbones: Mapping[str, nn.Module], inputs: Tensor, rounds: int = 10,
                        warmup: int = 3, progress: Progress | None = None
                        ) -> dict[str, list[float]]:
    """Time forward and backward of several backbones in turns; no optimizer step.

    Args:
        backbones: By name, on the device of `inputs`. Put into training mode;
            their BN statistics move.
        inputs: `(N, 3, H, W)`.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        progress: Told after every round.

    Returns:
        Durations in milliseconds, one per timed round, by name.
    """
    def step(backbone: nn.Module) -> None:
        sum(feature.mean() for feature in tree_leaves(backbone(inputs))).backward()
        backbone.zero_grad(set_to_none=True)

    for backbone in backbones.values():
        backbone.train()
    return time_calls({name: partial(step, backbone) for name, backbone in backbones.items()},
                      rounds, warmup,
                      progress=progress and partial(progress, 'timing training steps'))


def _models(cfg: Config, checkpoint: str | Path | None) -> dict[str, nn.Module]:
    """All forms in eval mode, on the CPU; all of the same weights."""
    stock_cfg = deploy_config(cfg)
    training = MODELS.build(cfg.model)
    require_training_form(training)
    if checkpoint is not None:
        load_weights(training, checkpoint)
    training.eval()  # a statement of its own: not every model's train() returns itself
    deployed = reparameterize(training)
    stock = MODELS.build(stock_cfg.model)
    stock.load_state_dict(deployed.state_dict(), strict=True)
    stock.eval()
    return {'training': training, 'deployed': deployed,
            'folded': reparameterize(deployed, fold_bn=True), 'stock': stock}


def _boxes(count: int, height: int, width: int) -> Tensor:
    """Random boxes of all sizes inside an image, `(count, 4)` in pixels: x1, y1, x2, y2."""
    corners = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([width, height])
    return torch.cat([corners.amin(0) * size, corners.amax(0) * size], dim=1)
