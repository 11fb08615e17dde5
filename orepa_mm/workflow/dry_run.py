"""A run in small: every step of it is tried, and nothing is kept."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from ..checkpoints import load_weights
from ..datasets.config_walk import dicts_with
from ..engine import bare_model, build_runner
from ..errors import ConfigError, DryRunError, UserError, explained
from ..files import require_writable_folder
from ..reparam import is_training_form
from .deploy import reparameterize_checkpoint
from .evidence import built_model

#: Batches that are validated, and test images on which both forms are compared.
_VALIDATED, _COMPARED = 2, 2


@dataclass(frozen=True)
class DryRunStep:
    """A step that worked.

    Attributes:
        name: What was done.
        note: What came of it, for a user.
        seconds: How long it took.
    """

    name: str
    note: str
    seconds: float

    def __str__(self) -> str:
        return f'dry run: {self.name}: {self.note} ({self.seconds:.1f} s)'


def dry_run(cfg: Config, iterations: int, say: Callable[[str], None] = print) -> list[DryRunStep]:
    """Train a few iterations, validate, save, load, re-parameterize and verify.

    The config's own model, data, optimizer and hooks run, in a temporary folder,
    of which nothing is kept. What would leave traces elsewhere is left out:
    loggers but for the local one, and the checkpoint hook's own folder; an epoch
    ends after `iterations`. What it does not try: learning rates and hooks of
    later iterations, the whole validation, several processes.

    Args:
        cfg: From `load_config`, with `use_training_options`; left as it is.
        iterations: How many to train, at least 1.
        say: Is called with one line for each step that worked, and one at the end.

    Returns:
        The steps; one that the config leaves no room for says so in its note.

    Raises:
        DryRunError: It names the step that failed, and why.
    """
    done = []
    with tempfile.TemporaryDirectory(prefix='orepa_mm-dry-run-') as folder:
        trial = _Trial(cfg, iterations, Path(folder))
        for name, work in trial.steps():
            start = time.perf_counter()
            try:
                note = work()
            except Exception as error:
                raise DryRunError(f'the dry run failed at the step "{name}". {_reason(error)}'
                                  ) from error
            done.append(DryRunStep(name, note, time.perf_counter() - start))
            say(str(done[-1]))
    total = sum(step.seconds for step in done)
    say(f'dry run: {len(done)} steps in {total:.1f} s, nothing was kept')
    return done


class _Trial:
    """The steps and what they hand on."""

    def __init__(self, cfg: Config, iterations: int, folder: Path) -> None:
        self.work_dir, self.cfg = Path(cfg.work_dir), _without_traces(cfg, folder)
        self.iterations, self.folder = iterations, folder
        self.checkpoint = folder / 'dry-run.pth'

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield 'build', self.build
        yield f'train {self.iterations} iterations', self.train
        yield 'validate', self.validate
        yield 'save', self.save
        yield 'load', self.load
        yield 're-parameterize and verify', self.deploy

    def build(self) -> str:
        require_writable_folder(self.work_dir)
        self.runner = build_runner(self.cfg)
        loop = self.runner.train_loop  # reads the data set
        if isinstance(loop, EpochBasedTrainLoop):
            loop.dataloader = _First(loop.dataloader, self.iterations)
            loop._max_epochs, loop._max_iters = 1, self.iterations
        elif isinstance(loop, IterBasedTrainLoop):
            loop._max_iters = self.iterations
        else:
            raise ConfigError(f'a dry run does not know how to shorten a {type(loop).__name__}')
        loop.val_begin = math.inf  # a step of its own
        return (f'{type(bare_model(self.runner)).__name__}, '
                f'{len(loop.dataloader.dataset)} training images')

    def train(self) -> str:
        self.runner.train()
        losses = self.runner.message_hub.log_scalars.get('train/loss')
        values = [] if losses is None else list(losses.data[0][-self.runner.iter:])
        if not all(map(math.isfinite, values)):
            raise ConfigError(f'the loss is not finite ({", ".join(map(str, values))}): try a '
                              'lower learning rate, and look through the data with check_data')
        note = f'{self.runner.iter} done'
        if values:
            note += f', loss {values[0]:.3f} to {values[-1]:.3f}'
        if torch.cuda.is_available():
            note += f', {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory'
        return note

    def validate(self) -> str:
        loop = self.runner.val_loop
        if loop is None:
            return 'left out, the config has no validation'
        loop.dataloader = _First(loop.dataloader, _VALIDATED)
        metrics = self.runner.val()
        batches = min(_VALIDATED, len(loop.dataloader))
        return f'{batches} batches, metrics {", ".join(metrics) or "none"}'

    def save(self) -> str:
        self.runner.save_checkpoint(str(self.folder), self.checkpoint.name)
        return f'{self.checkpoint.stat().st_size / 2**20:.1f} MiB'

    def load(self) -> str:
        self.model = built_model(self.cfg)
        state = load_weights(self.model, self.checkpoint)['state_dict']
        return f'{len(state)} tensors, strictly'

    def deploy(self) -> str:
        if not is_training_form(self.model):
            return 'left out, the model has nothing to re-parameterize'
        if self.cfg.get('test_dataloader') is None:
            return 'left out, the config has no test_dataloader to compare on'
        report = reparameterize_checkpoint(
            self.cfg, self.checkpoint, self.folder / 'deployed', test=False,
            num_images=_COMPARED, latency_rounds=1)
        worst = report['largest_difference'].get('float32')
        return (f'both forms agree on {report["images"]} images'
                + (f', largest relative difference {worst:.1e} in float32' if worst else ''))


class _First:
    """The first batches of a data loader; in everything else, the data loader."""

    def __init__(self, loader: DataLoader, number: int) -> None:
        self._loader, self._number = loader, number

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._number)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _without_traces(cfg: Config, folder: Path) -> Config:
    """A copy that writes nowhere but into a folder, and into no service."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir, cfg.resume = str(folder), False
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
        cfg.visualizer.pop('save_dir', None)
    hooks = cfg.get('default_hooks') or {}
    if hooks.get('checkpoint'):  # saving is a step of its own
        hooks.checkpoint.update(interval=-1, save_last=False)
        for key in ('out_dir', 'published_keys'):
            hooks.checkpoint.pop(key, None)
    if hooks.get('logger'):
        hooks.logger.update(interval=1)
        hooks.logger.pop('out_dir', None)
    for evaluator in (cfg.get('val_evaluator'), cfg.get('test_evaluator')):
        for key in ('outfile_prefix', 'output_dir'):  # of predictions to hand in
            for metric in dicts_with(key, evaluator):
                metric[key] = str(folder / 'predictions')
    return cfg


def _reason(error: Exception) -> str:
    """Why a step failed: of an error that is not the user's, also where."""
    if isinstance(error, (UserError, OSError, ImportError)):
        return explained(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__}: {explained(error)} ({last.filename}, line {last.lineno})'
