"""What a model costs: parameters, multiply-adds, file size, memory, latency."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

#: Is told what is being done, how many steps of it are done, and of how many.
Progress = Callable[[str, int, int], None]

#: What `count_operations` leaves out, as ATen names it: views and questions about shapes, which
#: launch nothing on a device, and allocations that nothing is written into.
NOT_COUNTED = frozenset((
    '_reshape_alias', '_unsafe_view', 'alias', 'as_strided', 'chunk', 'detach', 'diagonal',
    'expand', 'is_same_size', 'narrow', 'permute', 'select', 'slice', 'split', 'split_with_sizes',
    'squeeze', 't', 'transpose', 'unbind', 'unfold', 'unsqueeze', 'view', 'view_as',
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided'))


@dataclass(frozen=True)
class Form:
    """A form of a model that `measure_forms` measures.

    Attributes:
        model: In eval mode.
    """

    model: nn.Module


@dataclass(frozen=True)
class Cost:
    """What a form of a model costs.

    Attributes:
        parameters: Number of parameter values.
        multiply_adds: Of one call; OpenMMLab's FLOPs.
        file_bytes: Size of the state dict as `torch.save` writes it.
        peak_bytes: Weights, input, and what a call allocates on top at its
            highest point, see `peak_allocation`.
        latencies_ms: Duration of a call in milliseconds, of every timed round.
    """

    parameters: int
    multiply_adds: int
    file_bytes: int
    peak_bytes: int
    latencies_ms: tuple[float, ...]

    @property
    def latency_ms(self) -> float:
        """Median duration of a call in milliseconds."""
        return statistics.median(self.latencies_ms)

    @property
    def latency_p90_ms(self) -> float:
        """90th percentile of the duration of a call in milliseconds."""
        return float(np.percentile(self.latencies_ms, 90))


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


def count_operations(function: Callable[[], object]) -> int:
    """Number of operations that a call dispatches and that compute, forward and backward.

    On a GPU each launches a kernel or more, which costs the host 5 to 10
    microseconds whatever its size. A list of tensors that one operation works
    on (`torch._foreach_*`) counts once. Left out is `NOT_COUNTED`. What
    `torch.compile` generates does not go through the dispatcher and is not seen.

    Args:
        function: Called once.
    """
    with _Counter() as counter:
        function()
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts operations, see `count_operations`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition('::')[2]
        self.count += name not in NOT_COUNTED
        return func(*args, **(kwargs or {}))


def saved_bytes(function: Callable[[], object], beyond: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Counted is the memory behind every saved tensor, once.

    Args:
        function: A forward pass, called once with gradients. The tensors that
            it returns are not counted: they are there anyway.
        beyond: Tensors that are there anyway as well, e.g. parameters.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    there = {tensor.untyped_storage().data_ptr() for tensor in (*beyond, *tree_leaves(result))
             if isinstance(tensor, Tensor)}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in there)


def count_file_bytes(model: nn.Module) -> int:
    """Size in bytes of the file that `torch.save` makes of the state dict.

    Args:
        model: Any module.
    """
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


def count_tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers.

    Args:
        model: Any module.
    """
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def peak_allocation(function: Callable[[], object], device: torch.device | str = 'cpu') -> int:
    """Most bytes that a call holds at once in tensors that it allocates.

    Counted is what PyTorch's allocator of the device gives and takes back:
    intermediate and final results, generated kernels, workspaces of operators.
    Not counted is what was there before (weights, inputs), nor what libraries
    and Python allocate by themselves.

    Args:
        function: Called once, without gradients.
        device: Where it allocates. On a CPU the running sum of the profiler's
            allocator events is taken, on CUDA the allocator's own peak.

    Returns:
        Bytes above the level before the call.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '9')  # it would print that it starts and stops
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True,
                                  acc_events=True) as profiler:
        function()
    changes = sorted((event.start_ns(), number, event.nbytes()) for number, event
                     in enumerate(profiler.profiler.kineto_results.events())
                     if event.name() == '[memory]')
    return max(accumulate(change for *_, change in changes), default=0)


def time_calls(functions: Mapping[str, Callable[[], object]], rounds: int = 20, warmup: int = 3,
               prepare: Mapping[str, Callable[[], object]] | None = None,
               progress: Callable[[int, int], None] | None = None) -> dict[str, list[float]]:
    """Time several functions in turns, so that all see the same machine.

    In every round each is called once; the one that begins moves on by one.

    Args:
        functions: What to time, by name.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        prepare: What to call before a function of that name, untimed.
        progress: Told after every round how many are done, and of how many.

    Returns:
        Durations in milliseconds, one per timed round, by name.
    """
    names, prepare = list(functions), prepare or {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name in prepare:
                prepare[name]()
            _synchronize()
            start = time.perf_counter()
            functions[name]()
            _synchronize()
            duration = (time.perf_counter() - start) * 1000
            if number >= warmup:
                times[name].append(duration)
        if progress is not None:
            progress(number + 1, warmup + rounds)
    return times


def measure_latency(functions: Mapping[str, Callable[[], object]], repeats: int = 20,
                    warmup: int = 3) -> dict[str, float]:
    """Median duration of several calls, see `time_calls`.

    Args:
        functions: What to time, by name.
        repeats: Timed rounds.
        warmup: Rounds before them that are not timed.

    Returns:
        Median duration of each in milliseconds.
    """
    times = time_calls(functions, repeats, warmup)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_forms(forms: Mapping[str, Form], run: Callable[[nn.Module], object], inputs: Tensor,
                  rounds: int = 20, warmup: int = 3, progress: Progress | None = None
                  ) -> dict[str, Cost]:
    """Measure what several forms of a model cost, timed in turns.

    Args:
        forms: The forms by name, all on the device of `inputs`.
        run: Runs a model on `inputs`.
        inputs: Counted into the peak memory.
        rounds: Timed rounds.
        warmup: Rounds before them that are not timed.
        progress: Told after every step.
    """
    counts: dict[str, tuple[int, int, int, int]] = {}
    for number, (name, form) in enumerate(forms.items(), 1):
        with torch.no_grad():
            run(form.model)  # what a library sets up once belongs to no form
        multiply_adds = count_multiply_adds(partial(run, form.model))
        peak = peak_allocation(partial(run, form.model), inputs.device)
        counts[name] = (count_parameters(form.model), multiply_adds, count_file_bytes(form.model),
                        count_tensor_bytes(form.model) + inputs.nbytes + peak)
        if progress is not None:
            progress('counting operations and memory', number, len(forms))
    with torch.no_grad():
        times = time_calls(
            {name: partial(run, form.model) for name, form in forms.items()}, rounds, warmup,
            progress=progress and partial(progress, 'timing inference'))
    return {name: Cost(*counts[name], tuple(times[name])) for name in forms}


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two durations of the same round.

    A machine that slows down for a while slows both down; the ratio of their
    medians would show it.

    Args:
        times: One per round, from `time_calls`.
        reference: Of the same rounds.
    """
    return statistics.median(one / other for one, other in zip(times, reference, strict=True))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
