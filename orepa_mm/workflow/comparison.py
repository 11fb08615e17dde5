"""A comparison: the same training with and without OREPA, over several seeds."""

from __future__ import annotations

import copy
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ..analysis.variants import Variant, variant_config
from ..engine import check_pretrained
from ..errors import ConfigError
from ..files import written_whole
from .comparison_run import CONFIG, LOG, RESULT, TRAINED
from .curves import read_scalars

#: What is compared, in the folder of a comparison.
PLAN = 'plan.json'
#: Seconds between two looks at a process, and between two lines about it.
_LOOK, _SAY = 0.5, 60.0


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed.

    Attributes:
        variant: What is trained.
        seed: Of data order, augmentation and initial values.
        folder: Where everything of it lies.
    """

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What progress lines call it."""
        return f'{self.variant.text}, seed {self.seed}'

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of its `result.json`; None if it has not finished."""
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def fraction(self) -> float:
        """How much of its training has been logged, between 0 and 1."""
        loop = self._config.train_cfg
        name, total = (('iter', loop.max_iters) if 'max_iters' in loop
                       else ('epoch', loop.get('max_epochs', math.inf)))
        try:
            logged = read_scalars(self.folder / TRAINED).get(name, {})
        except (FileNotFoundError, ValueError):  # not begun; a line that is being written
            return 0.0
        done = max(logged.values(), default=0)
        return min(1.0, max(0.0, (done - (name == 'epoch')) / total))

    @property
    def complaint(self) -> str:
        """The last line of its log."""
        lines = (self.folder / LOG).read_text(errors='replace').strip().splitlines()
        return lines[-1] if lines else 'it says nothing'

    @cached_property
    def _config(self) -> Config:
        return Config.fromfile(self.folder / CONFIG)


def plan_runs(cfg: Config, variants: Sequence[Variant], seeds: Sequence[int], out: str | Path,
              plain_checkpoint: str | Path | None = None, step_interval: int = 50,
              title: str | None = None) -> list[Run]:
    """Write the config of every run, and which runs there are; what was planned before stays.

    Seeds are the outer loop: where a comparison is cut short, every variant has
    as many of them.

    Args:
        cfg: A training config with OREPA, from `orepa_mm.engine.load_config`.
        variants: What to compare.
        seeds: Seeds of each.
        out: The folder of the comparison.
        plain_checkpoint: See `variant_config`.
        step_interval: Every how many iterations the step of the kernels is measured;
            the next multiple that ends with a step where gradients are accumulated.
        title: Of the report; the folder's name by default.

    Returns:
        The runs that are asked for, in their order.

    Raises:
        CheckpointError: If the plain checkpoint does not fit.
        ConfigError: If a variant cannot be made, the config tests nothing, a seed
            is none, two variants would share a folder, or `out` is no folder or
            holds such a run of another config; nothing is written then.
        FileNotFoundError: If a file of pretrained weights is missing.
    """
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ConfigError(f'seeds lie between 0 and 2**32 - 1, got {list(seeds)}')
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f'{out} is no folder: choose another one with --out')
    runs, contents = [], []
    made = {}
    for variant in variants:
        made[variant.text] = variant_config(cfg, variant, plain_checkpoint)
        # gradients that are accumulated change no kernel before they are used
        accumulated = (made[variant.text].get('optim_wrapper') or {}).get('accumulative_counts', 1)
        hook = dict(type='KernelStepHook', interval=math.lcm(step_interval, accumulated))
        made[variant.text].custom_hooks = [*(made[variant.text].get('custom_hooks') or []), hook]
        made[variant.text].pop('work_dir', None)
        if made[variant.text].get('test_cfg') is None:
            raise ConfigError('the config tests nothing: give it a test_cfg, a test_dataloader and '
                              'a test_evaluator, from which the metric comes')
        check_pretrained(made[variant.text])
    for seed in dict.fromkeys(seeds):
        for variant in dict.fromkeys(variants):
            run = _run(variant, seed, out)
            content = copy.deepcopy(made[variant.text])
            content.randomness = {**(content.get('randomness') or {}), 'seed': seed}
            runs.append(run)
            contents.append(content.pretty_text)
            path = run.folder / CONFIG
            if path.is_file() and path.read_text('utf-8') != contents[-1]:
                raise ConfigError(f'{run.folder} is of another config or of other options: choose '
                                  'another folder with --out, or delete that run')
    earlier = planned_runs(out)[1] if (Path(out) / PLAN).is_file() else []
    owners: dict[Path, Run] = {}
    for run in [*earlier, *runs]:
        other = owners.setdefault(run.folder, run)
        if other != run:
            raise ConfigError(f'the variants {other.variant.text!r} and {run.variant.text!r} would '
                              f'share the folder {run.folder}: spell one of them differently')
    for run, content in zip(runs, contents):
        if not (run.folder / CONFIG).is_file():
            with written_whole(run.folder / CONFIG) as path:
                path.write_text(content, 'utf-8')
    content = {'title': title or Path(out).resolve().name,
               'runs': [(run.variant.text, run.seed)
                        for run in dict.fromkeys([*earlier, *runs])]}
    with written_whole(Path(out) / PLAN) as path:
        path.write_text(json.dumps(content, indent=1))
    return runs


def planned_runs(out: str | Path) -> tuple[str, list[Run]]:
    """Title and all runs of a comparison, in the order in which they were asked for.

    Args:
        out: Its folder.

    Raises:
        ConfigError: If nothing was planned there.
    """
    path = Path(out) / PLAN
    if not path.is_file():
        raise ConfigError(f'{out} is no folder of a comparison: it has no {PLAN}')
    plan = json.loads(path.read_text())
    return plan['title'], [_run(Variant.parse(text), seed, out) for text, seed in plan['runs']]


def _run(variant: Variant, seed: int, out: str | Path) -> Run:
    return Run(variant, seed, Path(out) / 'runs' / variant.slug / f'seed{seed}')


def execute(runs: Iterable[Run], parallel: int = 1, say: Callable[[str], None] = print
            ) -> list[Run]:
    """Run what has not finished, each in a process of its own.

    Args:
        runs: From `plan_runs`.
        parallel: How many at once. They share the cores, and take turns on the GPUs.
        say: Is given lines of progress: at each start and end, and once a minute.

    Returns:
        The runs that failed; the others went on.
    """
    runs = list(runs)
    progress = _Progress(runs, parallel, say)

    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(parallel):
        slots.put(slot)

    def one(run: Run) -> bool:
        slot = slots.get()
        progress.start(run)
        try:
            code = _train(run, slot, parallel, progress.stopped)
        finally:
            slots.put(slot)
        progress.end(run, code)
        return code == 0

    with ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(one, run): run for run in progress.todo}
        try:
            while wait(futures, _SAY).not_done:
                progress.report()
        except BaseException:  # whatever stops this stops the processes
            progress.stopped.set()
            for future in futures:
                future.cancel()
            raise
    return [run for future, run in futures.items() if not future.result()]


def _environment(slot: int, parallel: int) -> dict[str, str]:
    """Of the process that trains at one of so many places: its share of the machine."""
    environment = dict(os.environ)
    if parallel > 1:
        threads = max(1, (os.cpu_count() or 1) // parallel)
        environment.setdefault('OMP_NUM_THREADS', str(threads))
        count = torch.cuda.device_count()
        if count > 1:
            ours = environment.get('CUDA_VISIBLE_DEVICES')  # not all may be for us
            names = ours.split(',') if ours else list(map(str, range(count)))
            environment['CUDA_VISIBLE_DEVICES'] = names[slot % count]
    return environment


def _train(run: Run, slot: int, parallel: int, stopped: threading.Event) -> int:
    """Train one run in a process of its own; its exit code."""
    environment = _environment(slot, parallel)
    with (run.folder / LOG).open('a') as log:
        process = subprocess.Popen([sys.executable, '-m', 'orepa_mm.workflow.comparison_run',
                                    str(run.folder), str(os.getpid())], stdout=log,
                                   stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None and not stopped.wait(_LOOK):
                pass
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode or (0 if run.result else 1)


class _Progress:
    """What is said of the runs, and when all of them will be done."""

    def __init__(self, runs: Sequence[Run], parallel: int, say: Callable[[str], None]) -> None:
        self.todo = [run for run in runs if run.result is None]
        self.stopped = threading.Event()
        self._parallel, self._say, self._turn = parallel, say, threading.Lock()
        self._finished = {run: run.result['seconds'] for run in runs if run not in self.todo}
        #: Of the runs that run: when they started, and how much of them was done before.
        self._started: dict[Run, tuple[float, float]] = {}
        if len(self.todo) < len(runs):
            say(f'{len(runs) - len(self.todo)} of {len(runs)} runs have finished before')

    def start(self, run: Run) -> None:
        self._started[run] = time.time(), run.fraction
        before = self._started[run][1]
        self._line(run, 'goes on' if before else 'starts')

    def end(self, run: Run, code: int) -> None:
        start, _ = self._started.pop(run)
        if self.stopped.is_set():
            return
        if code:
            self._line(run, f'FAILED: {run.complaint}\n  see {run.folder / LOG}')
        else:
            self._finished[run] = run.result['seconds']
            self._line(run, f'finished in {_duration(time.time() - start)}')

    def report(self) -> None:
        """One line for each run that runs."""
        for run in list(self._started):
            self._line(run, f'{run.fraction:.0%} trained')

    def _line(self, run: Run, what: str) -> None:
        left = self._seconds_left()
        end = time.strftime('%a %H:%M', time.localtime(time.time() + left))
        when = f'; all will be done at about {end}' if left else ''
        with self._turn:  # runs that are parallel speak one after the other
            self._say(f'[{self.todo.index(run) + 1}/{len(self.todo)}] {run.name}: {what}{when}')

    def _seconds_left(self) -> float:
        """Estimated from finished runs, of the same variant where there are any."""
        left = 0.0
        for run in self.todo:
            if run in self._finished:
                continue
            seconds = self._expected(run)
            if seconds is None:
                return 0.0
            left += seconds * (1 - run.fraction)
        return left / self._parallel

    def _expected(self, run: Run) -> float | None:
        same = [seconds for other, seconds in self._finished.items()
                if other.variant == run.variant]
        if same or self._finished:
            return statistics.fmean(same or self._finished.values())
        for other, (start, before) in self._started.items():  # the first: as fast as it is
            done = other.fraction - before
            if done > 0.05:
                return (time.time() - start) / done
        return None


def _duration(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'
