"""What training and evaluation cost: squeeze, step, memory, latency of the forms of a network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..layers import DBBConv2d, ReparamConv2d, reparam_layers
from . import networks as names
from .benchmark import network
from .conditions import conditions, config_title
from .cost_table import Measurement, Row
from .measure import (
    Progress,
    count_operations,
    count_tensor_bytes,
    peak_allocation,
    saved_bytes,
    time_calls,
)
from .networks import Network, build_networks, config_networks, resnet
from .reference_blocks import ReferenceConv2d
from .squeeze_theory import memory_floor, products_alone


@dataclass(frozen=True)
class Settings:
    """What is run, and how often.

    Attributes:
        input_shape: `(N, 3, H, W)` of the random input.
        base_channels: Width of a network's first stage; 64 as published.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        threads: Threads of the CPU; PyTorch's own number if None.
        name: Appended to the names of files, e.g. `-launch-bound`.
    """

    input_shape: tuple[int, int, int, int] = (2, 3, 416, 544)
    base_channels: int = 64
    rounds: int = 10
    warmup: int = 2
    threads: int | None = None
    name: str = ''

    @classmethod
    def launch_bound(cls, rounds: int = 50, warmup: int = 5) -> Settings:
        """So little work that what is felt is the number of operations.

        Args:
            rounds: Timed rounds.
            warmup: Rounds before them.
        """
        return cls((2, 3, 64, 64), 8, rounds, warmup, 1, '-launch-bound')

    @property
    def kind(self) -> str:
        """What a title says of it: nothing, or `, launch-bound`."""
        return self.name.replace('-', ', ', 1)

    @property
    def device(self) -> torch.device:
        """The GPU, if there is one."""
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')

    def inputs(self) -> Tensor:
        """The random input, on the device."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.input_shape, generator=generator).to(self.device)

    def conditions(self, **more: Any) -> dict[str, Any]:
        """Where and how it was measured.

        Args:
            **more: What else there is to say.
        """
        return {**conditions(self.device, 'mmdet'), 'input': list(self.input_shape),
                'base_channels': self.base_channels, 'rounds': self.rounds,
                'warmup': self.warmup, **more}

    @contextlib.contextmanager
    def on_threads(self) -> Iterator[None]:
        """Run on that many threads, and afterwards on as many as before."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class _Subject:
    """A row to be: what to run.

    `forward` returns what a backward pass starts from; None where there is none.
    """

    name: str
    reference: str
    run: Callable[[], object] | None
    forward: Callable[[], object] | None = None
    there: Sequence[Tensor] = ()
    note: str = ''
    extra: dict[str, Any] = field(default_factory=dict)


def measure_squeeze(settings: Settings, progress: Progress | None = None) -> Measurement:
    """Squeeze all layers of a ResNet-50, forward and backward, with random gradients.

    Args:
        settings: The input's shape plays no part.
        progress: Told after every step.
    """
    with settings.on_threads():
        subjects, floor = [], None
        for built in build_networks([names.PUBLISHED, names.OURS, names.COMPILED],
                                    settings.device, settings.base_channels, names.OURS):
            if built.model is None:
                subjects.append(_Subject(built.name, names.OURS, None, note=built.missing))
                continue
            layers = _generating(built.model)
            kernels = partial(_kernels, layers)
            with torch.no_grad():
                gradients = [torch.randn_like(kernel) for kernel in kernels()]
            subjects.append(_Subject(
                built.name, names.OURS, partial(_squeeze, built.model, layers, gradients), kernels,
                _tensors(built.model)))
            floor = floor or products_alone(list(reparam_layers(built.model)), settings.device)
        subjects.append(_Subject('its matrix products alone', names.OURS, floor))
        rows = _measure(subjects, settings, progress)
        return Measurement(
            f'squeeze{settings.name}', 'Squeezing all layers of a ResNet-50, forward and backward',
            'Saved: for the backward pass, beyond parameters and kernels. Peak: what PyTorch '
            'allocates in a call.', rows, _without_input(settings.conditions()))


def measure_step(settings: Settings, progress: Progress | None = None) -> Measurement:
    """Forward and backward of backbones in training, nothing frozen, no optimizer step.

    Args:
        settings: What to run.
        progress: Told after every step.
    """
    with settings.on_threads():
        inputs = settings.inputs()
        subjects = [_step_subject(built, lambda model: model(inputs))
                    for built in build_networks(
                        [names.PLAIN, names.DBB, names.PUBLISHED, names.OURS, names.COMPILED,
                         names.REPVGG_PLAIN, names.REPVGG], settings.device,
                        settings.base_channels)]
        return Measurement(
            f'step{settings.name}',
            f'Training step of a ResNet-50 backbone, nothing frozen{settings.kind}',
            _STEP, _measure(subjects, settings, progress), settings.conditions())


def measure_config_step(cfg: Config, settings: Settings, progress: Progress | None = None
                        ) -> Measurement:
    """Forward and backward of the whole network of a config, frozen as the config says.

    The raw outputs of all heads go into the backward pass; matching boxes to
    the ground truth and the loss, which no form changes, are left out.

    Args:
        cfg: A training config, from `orepa_mm.engine.load_config`.
        settings: What to run; `base_channels` plays no part.
        progress: Told after every step.

    Raises:
        ConfigError: If the config is not in training form, nothing in its network
            is trained, or it does not run on such an input.
    """
    with settings.on_threads():
        inputs = settings.inputs()
        built = config_networks(cfg, settings.device)
        run = network(next(one.model for one in built if one.name == names.OURS), inputs)
        title = config_title(cfg)
        try:
            rows = _measure([_step_subject(one, run) for one in built], settings, progress)
        except ConfigError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ConfigError('the network does not run on an input of shape '
                              f'{" x ".join(map(str, settings.input_shape))}: {error}') from error
        where = settings.conditions(config=title)
        del where['base_channels']
        return Measurement(f'step-{title}{settings.name}', f'Training step of {title}',
                           f'The whole network up to the raw outputs of its heads. {_STEP}', rows,
                           where)


def measure_memory(settings: Settings, progress: Progress | None = None) -> Measurement:
    """What training holds in memory, beside what cannot be less.

    Args:
        settings: What to run; nothing is timed.
        progress: Told after every step.
    """
    with settings.on_threads():
        inputs = settings.inputs()
        rows, plain = [], 0
        wanted = [names.PLAIN, names.DBB, names.PUBLISHED, names.OURS, names.COMPILED]
        plain_parameters = _count(resnet(names.PLAIN, settings.base_channels))
        for number, name in enumerate(wanted, 1):
            built = build_networks([name], settings.device, settings.base_channels)[0]
            if built.model is None:
                rows.append(Row(name, note=built.missing))
                continue
            subject = _step_subject(built, lambda model: model(inputs))
            subject.run()  # what a library sets up once belongs to no row
            parameters, layers = _count(built.model), _generating(built.model)
            with torch.no_grad():
                kernels = sum(kernel.numel() for kernel in _kernels(layers))
            peak = peak_allocation(subject.run, settings.device)
            # weights, momentum, input, and what a step allocates: gradients are part of that
            total = count_tensor_bytes(built.model) + 4 * parameters + inputs.nbytes + peak
            plain = plain or total
            floor = plain + sum(memory_floor(parameters - plain_parameters, kernels).values())
            squeezing = saved_bytes(partial(_kernels, layers), _tensors(built.model))
            rows.append(Row(
                name, saved_bytes=saved_bytes(subject.forward, subject.there), peak_bytes=total,
                extra={'parameters (M)': f'{parameters / 1e6:.2f}',
                       'kernels (M)': f'{kernels / 1e6:.2f}',
                       'saved by squeezing (MB)': f'{squeezing / 1e6:.1f}' if layers else '',
                       'floor (MB)': f'{floor / 1e6:.1f}',
                       'over the floor': f'{100 * (total / floor - 1):+.1f} %'}))
            if progress is not None:
                progress('measuring memory', number, len(wanted))
        return Measurement(
            f'memory{settings.name}',
            f'Memory of a training step of a ResNet-50 backbone{settings.kind}',
            'Saved: for the backward pass, beyond parameters. Peak: parameters, momentum, input, '
            'and what PyTorch allocates in a step, gradients among it. Saved by squeezing: beyond '
            'parameters and kernels. Floor: the plain network and three copies of the further '
            'parameters (value, gradient, momentum) and one of the kernels.', tuple(rows),
            {key: value for key, value in settings.conditions().items()
             if key not in ('rounds', 'warmup')})


def measure_latency(settings: Settings, progress: Progress | None = None) -> Measurement:
    """Forward passes of backbones in eval mode.

    Args:
        settings: What to run.
        progress: Told after every step.
    """
    with settings.on_threads():
        inputs = settings.inputs()
        subjects = []
        for built in build_networks([names.PLAIN, names.DBB, names.PUBLISHED, names.OURS,
                                     names.DEPLOYED], settings.device, settings.base_channels,
                                    reference=names.DEPLOYED):
            if built.model is None:
                subjects.append(_Subject(built.name, built.reference, None, note=built.missing))
                continue
            built.model.eval()
            subjects.append(_Subject(built.name, built.reference,
                                     torch.no_grad()(partial(built.model, inputs))))
        return Measurement(
            f'latency{settings.name}',
            f'Forward pass of a ResNet-50 backbone in eval mode{settings.kind}',
            'Plain is the stock network. The training form generates its kernels at every call. '
            'Peak: what PyTorch allocates in a call.',
            _measure(subjects, settings, progress), settings.conditions())


_STEP = ('Forward and backward, no optimizer step. Operations: those that compute, forward and '
         'backward; generated code does not show. Saved: for the backward pass, beyond '
         'parameters. Peak: what PyTorch allocates in a step, gradients among it.')


def _measure(subjects: Sequence[_Subject], settings: Settings, progress: Progress | None
             ) -> tuple[Row, ...]:
    """Count, then time all in turns."""
    rows = {}
    available = [subject for subject in subjects if subject.run is not None]
    for number, subject in enumerate(available, 1):
        compiled, note = subject.name == names.COMPILED, subject.note
        start = time.perf_counter()
        subject.run()  # what is set up or compiled once belongs to no row
        if compiled:
            note = f'first call: {time.perf_counter() - start:.1f} s'
            if not counters['aot_autograd']['ok']:  # counted when a graph has been compiled
                note = 'not compiled: it ran eagerly'
        rows[subject.name] = Row(
            subject.name, reference=subject.reference,
            operations=None if compiled else count_operations(subject.run),
            saved_bytes=subject.forward and saved_bytes(subject.forward, subject.there),
            peak_bytes=peak_allocation(subject.run, settings.device), note=note,
            extra=subject.extra)
        if progress is not None:
            progress('counting operations and memory', number, len(available))
    times = time_calls({subject.name: subject.run for subject in available}, settings.rounds,
                       settings.warmup, progress=progress and partial(progress, 'timing'))
    return tuple(
        Row(**{**vars(rows[subject.name]), 'times_ms': tuple(times[subject.name])})
        if subject.run is not None else Row(subject.name, note=subject.note)
        for subject in subjects)


def _step_subject(built: Network, run: Callable[[nn.Module], object]) -> _Subject:
    if built.model is None:
        return _Subject(built.name, built.reference, None, note=built.missing)
    model = built.model

    def forward() -> Tensor:
        total = sum(output.mean() for output in tree_leaves(run(model))
                    if isinstance(output, Tensor) and output.requires_grad)
        if not isinstance(total, Tensor):
            raise ConfigError('no output of the network depends on a weight that is trained: '
                              'there is no backward pass to measure')
        return total

    @torch.enable_grad()  # memory is measured where gradients are off
    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    return _Subject(built.name, built.reference, step, forward, _tensors(model))


def _generating(model: nn.Module) -> list[ReparamConv2d | ReferenceConv2d]:
    """The layers of a network whose kernel is squeezed in training."""
    references = [module for module in model.modules() if isinstance(module, ReferenceConv2d)]
    inside = {module for reference in references for module in reference.generators.modules()}
    return [reference for reference in references if reference not in inside] or [
        layer for layer in reparam_layers(model) if not isinstance(layer, DBBConv2d)]


def _kernels(layers: Sequence[ReparamConv2d | ReferenceConv2d]) -> list[Tensor]:
    """All kernels as the forward pass takes them; `weight` would hand out what may be written."""
    return [layer.kernel() if isinstance(layer, ReferenceConv2d) else layer._generate()
            for layer in layers]


@torch.enable_grad()
def _squeeze(model: nn.Module, layers: Sequence[ReparamConv2d | ReferenceConv2d],
             gradients: Sequence[Tensor]) -> None:
    torch.autograd.backward(_kernels(layers), gradients)
    model.zero_grad(set_to_none=True)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _without_input(where: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in where.items() if key != 'input'}
