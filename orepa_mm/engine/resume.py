"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..checkpoints.io import read_file
from ..errors import CheckpointError
from .checkpoint_hook import LAST_CHECKPOINT


def newest_checkpoint(work_dir: str | Path, folders: Iterable[str | Path] = ()
                      ) -> tuple[str | None, str]:
    """Find what to resume from: what `last_checkpoint` names, if it is whole.

    If it is not, the checkpoint that was written last among those that are
    whole and hold what a run needs to go on (the best ones and published ones
    lack the optimizer's state). Checkpoints are read to find out.

    Args:
        work_dir: Folder of the run, where `last_checkpoint` is.
        folders: Where else the run writes checkpoints.

    Returns:
        Path of the checkpoint, or None if the run has not written any; and
        what was wrong with `last_checkpoint`, empty if nothing was.

    Raises:
        CheckpointError: If there are checkpoints, but none to go on from.
    """
    pointer = Path(work_dir) / LAST_CHECKPOINT
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    if '://' in named or (named and Path(named).is_dir()):
        return named, ''  # of a remote file or a folder of shards nothing is known
    problem = f'{pointer} is {"empty" if pointer.is_file() else "not there"}'
    if named:
        _, reason = _read(named)
        if not reason:
            return named, ''
        problem = f'{pointer} is of no use: {reason}'
    files = {path.resolve() for folder in (work_dir, *folders)
             for path in Path(folder).glob('*.pth') if not path.name.startswith('.')}
    reasons = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        content, reason = _read(path)
        if reason:
            reasons.append(reason)
        elif isinstance(content, dict) and {'meta', 'message_hub', 'optimizer'} <= content.keys():
            return str(path), problem
    if reasons or pointer.is_file():
        raise CheckpointError('\n'.join([
            f'there is nothing to resume from in {work_dir}: {problem}', *reasons,
            'To start anew, take another work folder, or remove its checkpoints and '
            f'{LAST_CHECKPOINT}.']))
    return None, ''


class FinalValidationHook(Hook):
    """Validate a run that was resumed after its last iteration.

    A checkpoint is written before the validation. A run that was killed in
    between has nothing left to train, and MMEngine would not validate it.
    """

    def before_train(self, runner: Runner) -> None:
        """Note where the run begins.

        Args:
            runner: The runner.
        """
        self._start = runner.iter

    def after_train(self, runner: Runner) -> None:
        """Validate if there was nothing to train.

        Args:
            runner: The runner.
        """
        if runner.iter == self._start and runner.val_loop is not None:
            print_log('nothing was left to train: validating', 'current')
            runner.val_loop.run()


def checkpoint_folders(runner: Runner) -> list[str]:
    """Folders other than the work folder into which a runner's hooks write checkpoints.

    Args:
        runner: A runner that has not trained yet.
    """
    name = os.path.basename(runner.work_dir)
    return [os.path.join(hook.out_dir, name) for hook in runner.hooks
            if isinstance(hook, CheckpointHook) and hook.out_dir is not None
            and '://' not in str(hook.out_dir)]


def _read(path: str | Path) -> tuple[Any, str]:
    """What a checkpoint file holds, and why it cannot be read, empty if it can."""
    try:
        # as the runner will load it: PyTorch's environment variable may allow more
        return read_file(path, weights_only=None), ''
    except FileNotFoundError:
        return None, f'there is no file {path}'
    except (CheckpointError, OSError) as error:
        return None, str(error)
