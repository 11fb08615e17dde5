"""A run that was interrupted and goes on ends as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.utils import set_random_seed
from torch.utils.data import DataLoader

from ..errors import ConfigError

#: What random numbers are drawn for; each kind has its own.
_TRAINING, _DATA, _EPOCH = range(3)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make a resumed run end with the weights of one that was never interrupted.

    A checkpoint holds no state of the random generators, and a validation in
    between moves it. With this hook the generators start anew at each iteration,
    from the run's seed, the rank and the number of the iteration, so that the
    random numbers of an iteration do not depend on what ran before it. They are
    other ones than without the hook. Data workers of a run by epochs start anew
    at each epoch alike.

    What it needs beside: `randomness.seed`; deterministic operations (on CUDA
    `randomness.deterministic=True`); a run that is resumed on as many processes
    and data workers as it began with; a checkpoint from the end of an epoch where the
    run goes by epochs, with `persistent_workers=False` if it has data workers. A
    run by iterations reads again what it has seen, as MMEngine does, to get to
    where it was.

    Raises:
        ConfigError: Before training, if the config has no seed, or data workers
            would outlive an epoch.

    Example:
        >>> custom_hooks = [dict(type='ExactResumeHook')]
    """

    #: After hooks that draw random numbers before an iteration.
    priority = 'VERY_LOW'

    def before_run(self, runner: Runner) -> None:
        """Refuse what could not be resumed exactly.

        Args:
            runner: The runner, which has not resumed yet.
        """
        if (runner.cfg.get('randomness') or {}).get('seed') is None:
            raise ConfigError('ExactResumeHook needs a seed: set randomness.seed, e.g. to 0')

    def before_train(self, runner: Runner) -> None:
        """Let each batch have its own random numbers, in a run by iterations.

        Args:
            runner: The runner.
        """
        self._seed = runner.cfg.randomness.seed
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _Seeded(loop.dataloader_iterator, self._seed)
        elif loop.dataloader.num_workers and loop.dataloader.persistent_workers:
            raise ConfigError('ExactResumeHook cannot resume data workers that outlive an epoch: '
                              'set train_dataloader.persistent_workers=False')

    def before_train_epoch(self, runner: Runner) -> None:
        """Start the random numbers of an epoch: of this process, and of its data workers.

        Args:
            runner: The runner.
        """
        _start(self._seed, _EPOCH, runner.epoch)
        loader = runner.train_loop.dataloader
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            _start_workers(loader, _derived(self._seed, _EPOCH, runner.epoch))

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | tuple | list | None = None) -> None:
        """Start the random numbers of an iteration.

        Args:
            runner: The runner.
            batch_idx: Not used.
            data_batch: Not used.
        """
        _start(self._seed, _TRAINING, runner.iter)


class _Seeded:
    """Batches, each drawn with its own random numbers."""

    def __init__(self, batches: Iterator[Any], seed: int) -> None:
        self._batches, self._seed, self._count = batches, seed, 0

    def __iter__(self) -> _Seeded:
        return self

    def __next__(self) -> Any:
        _start(self._seed, _DATA, self._count)
        self._count += 1
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        """Read batches again, to get to where a run was: the forks' MMEngine leaves that to us."""
        for _ in range(count):
            next(self)


def _derived(seed: int, kind: int, number: int) -> int:
    """A seed for one kind of random numbers of one iteration or epoch, on this rank."""
    return int(np.random.SeedSequence([seed, get_rank(), kind, number]).generate_state(1)[0])


def _start(seed: int, kind: int, number: int) -> None:
    set_random_seed(_derived(seed, kind, number))


def _start_workers(loader: DataLoader, seed: int) -> None:
    """Let data workers start from a seed, where they start as MMEngine lets them."""
    function = loader.worker_init_fn
    if 'seed' in (getattr(function, 'keywords', None) or {}):
        # a rank's workers have seeds side by side, of at most 2**32
        function.keywords['seed'] = seed % 2**31
