"""What a config's optimizer step and its re-parameterization cost; and what must be computed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from ..checkpoints import load_weights
from ..export.stock import deploy_config, save_deployed
from ..reparam import reparameterize
from .conditions import conditions, config_title
from .cost_table import Measurement, Row
from .measure import Progress, count_operations, count_tensor_bytes, peak_allocation, time_calls
from .networks import OURS, PLAIN, require_training_form, resnet
from .squeeze_theory import conv_multiply_adds, memory_floor, squeeze_costs


def measure_convert(cfg: Config, rounds: int = 5, warmup: int = 1,
                    progress: Progress | None = None) -> Measurement:
    """Load a checkpoint, squeeze, and save, on the CPU: what re-parameterizing costs.

    Building the model, comparing the two forms and testing them are left out.

    Args:
        cfg: A training config, from `orepa_mm.engine.load_config`.
        rounds: Timed rounds.
        warmup: Rounds before them.
        progress: Told after every step.

    Raises:
        ConfigError: If the config has no deployed counterpart.
        NothingToConvertError: If the model is not in training form.
    """
    deployed_cfg = deploy_config(cfg)
    model = MODELS.build(cfg.model)
    require_training_form(model)
    model.eval()
    held = count_tensor_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'checkpoint.pth'
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
        deployed = reparameterize(model)
        load = partial(load_weights, model, path)
        squeeze = partial(reparameterize, model)
        save = partial(save_deployed, deployed, deployed_cfg, Path(folder) / 'deployed', {})

        def everything() -> None:
            load_weights(model, path)
            save_deployed(reparameterize(model), deployed_cfg, Path(folder) / 'deployed', {})

        calls: dict[str, Callable[[], object]] = {
            'load': load, 'squeeze': squeeze, 'save': save, 'all three': everything}
        peaks = {}
        for number, (name, call) in enumerate(calls.items(), 1):
            peaks[name] = peak_allocation(call)
            if progress is not None:
                progress('measuring memory', number, len(calls))
        times = time_calls(calls, rounds, warmup,
                           progress=progress and partial(progress, 'timing'))
    rows = tuple(Row(name, tuple(times[name]), peak_bytes=peaks[name],
                     extra={'peak with the model, over it': (held + peaks[name]) / held})
                 for name in calls)
    title = config_title(cfg)
    return Measurement(
        f'convert-{title}', f'Re-parameterizing {title}',
        f'Peak: what PyTorch allocates in a call, beside the model in training form, which takes '
        f'{held / 1e6:.1f} MB.', rows,
        {**conditions(torch.device('cpu'), cfg.get('default_scope')), 'rounds': rounds,
         'warmup': warmup})


def measure_optimizer(cfg: Config, rounds: int = 10, warmup: int = 2,
                      progress: Progress | None = None) -> Measurement:
    """Step the optimizer of a config, in training form and of the stock model.

    Args:
        cfg: A training config, from `orepa_mm.engine.load_config`.
        rounds: Timed rounds.
        warmup: Rounds before them.
        progress: Told after every step.

    Raises:
        ConfigError: If the config has no deployed counterpart.
        NothingToConvertError: If the model is not in training form.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    calls, rows = {}, []
    for number, (name, one) in enumerate(((PLAIN, deploy_config(cfg)), (OURS, cfg)), 1):
        model = MODELS.build(one.model)
        if name == OURS:
            require_training_form(model)
        model.to(device)
        settings = copy.deepcopy(one.optim_wrapper)
        # on a CPU PyTorch would loop over the parameters; on a GPU this is its own choice
        settings.optimizer['foreach'] = True
        optimizer = build_optim_wrapper(model, settings).optimizer
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()  # makes the momentum
        calls[name] = optimizer.step
        rows.append(Row(name, reference=PLAIN, operations=count_operations(optimizer.step), extra={
            'groups': len(optimizer.param_groups),
            'parameter tensors': sum(len(group['params']) for group in optimizer.param_groups),
            'parameters (M)': f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}'}))
        if progress is not None:
            progress('counting operations', number, 2)
    times = time_calls(calls, rounds, warmup, progress=progress and partial(progress, 'timing'))
    title = config_title(cfg)
    return Measurement(
        f'optimizer-{title}', f'One step of the optimizer of {title}',
        'With foreach=True, as PyTorch chooses on a GPU: an operation over a list of tensors '
        'counts once. Plain is the stock model with the options that stock MMEngine knows.',
        tuple(Row(**{**vars(row), 'times_ms': tuple(times[row.name])}) for row in rows),
        {**conditions(device, cfg.get('default_scope')), 'rounds': rounds, 'warmup': warmup})


def squeeze_theory(shapes: Sequence[tuple[int, int, int, int]] = (
        (2, 3, 416, 544), (2, 3, 800, 1333)), base_channels: int = 64) -> Measurement:
    """What squeezing a ResNet-50 must compute and move, against what its feature maps cost.

    Nothing is run: formulas over the shapes of the layers.

    Args:
        shapes: Input shapes `(N, 3, H, W)`.
        base_channels: Width of the first stage.
    """
    with torch.device('meta'):
        training, stock = resnet(OURS, base_channels), resnet(PLAIN, base_channels)
    costs = squeeze_costs(training)
    rows: list[Row] = []

    def add(name: str, forward: int, step: int, **extra: Any) -> None:
        rows.append(Row(name, extra={**extra, 'forward (G)': f'{forward / 1e9:.2f}',
                                     'forward + backward (G)': f'{step / 1e9:.2f}'}))

    for cost in costs:
        add(f'squeeze: {cost.kind}', cost.forward, cost.step, layers=cost.layers)
    forward, step = (sum(getattr(cost, key) for cost in costs) for key in ('forward', 'step'))
    add('squeeze: all', forward, step, layers=sum(cost.layers for cost in costs))
    for shape in shapes:
        plain = conv_multiply_adds(stock, shape)
        add(f'convolutions at {" x ".join(map(str, shape))}', plain['forward'], plain['step'])
        rows[-1].extra['squeeze / convolutions'] = f'{100 * step / plain["step"]:.1f} %'
    parameters = sum(cost.parameters for cost in costs)
    kernels = sum(cost.kernel_values for cost in costs)
    for row, cost in zip(rows, costs):
        row.extra.update(_traffic(cost.forward_bytes, cost.step_bytes))
    rows[len(costs)].extra.update(_traffic(*(sum(getattr(cost, key) for cost in costs)
                                             for key in ('forward_bytes', 'step_bytes'))))
    floor = memory_floor(parameters, kernels)
    return Measurement(
        'theory', 'What squeezing a ResNet-50 must compute, in multiply-adds',
        'Bytes: every branch, kernel and gradient read or written once, in float32. Held while '
        'training, branches: ' + ', '.join(f'{name} {value / 1e6:.0f} MB'
                                           for name, value in floor.items())
        + f'; {parameters / 1e6:.1f} M values in branches, {kernels / 1e6:.1f} M in kernels. '
        'No clock: formulas over the shapes of the layers.', tuple(rows),
        {**conditions(torch.device('cpu'), 'mmdet'), 'base_channels': base_channels})


def _traffic(forward: int, step: int) -> dict[str, str]:
    return {'forward (MB)': f'{forward / 1e6:.0f}', 'forward + backward (MB)': f'{step / 1e6:.0f}'}
