"""Checkpoints that survive a kill at any moment: the hook that writes them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..files import remove_unfinished, written_whole

#: Where MMEngine notes which checkpoint is the last, inside the work folder.
LAST_CHECKPOINT = 'last_checkpoint'
#: Under which name MMEngine's file functions find `WholeFileBackend`.
_BACKEND = 'orepa_mm_whole'
#: In the message hub, and so in the checkpoint: names of what it makes superfluous.
_OUTDATED = 'outdated_ckpts'


class WholeFileBackend(LocalBackend):
    """MMEngine's local files, but one that is there is whole, and on the disk."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file under a temporary name, then rename it.

        Args:
            obj: What to write.
            filepath: The file to be.
        """
        with written_whole(filepath) as temporary, temporary.open('wb') as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())


register_backend(_BACKEND, WholeFileBackend, force=True)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's `CheckpointHook`, whose run can be killed at any moment.

    The stock hook removes the oldest checkpoint first and then writes the new
    one in place: with `max_keep_ckpts=1` a kill in between leaves none. Here
    the new one is written under a temporary name and renamed, then
    `last_checkpoint` is made to name it, and only then are old ones removed,
    those of `save_best` too. A kill costs what was trained since the last
    checkpoint. What a killed run left, unfinished files and what it had no time
    to remove, is removed when the run goes on.

    Needed: disk space for one more checkpoint while one is written. All
    arguments are those of the stock hook. On a storage that is no local folder,
    a file is written as that storage does. What `published_keys` publishes
    after the training is written as the stock hook does, in place.

    Example:
        >>> default_hooks = dict(checkpoint=dict(type='WholeCheckpointHook'))
    """

    #: What takes its place in a config that is to do without this package.
    stock_type = 'CheckpointHook'

    def before_train(self, runner: Runner) -> None:
        """Find out where to write, and remove what a killed run left there.

        Args:
            runner: The runner.
        """
        super().before_train(runner)
        if self.file_client_args is None and type(self.file_backend) is LocalBackend:
            self.backend_args = dict(backend=_BACKEND)
        self.file_backend = _RemovesLater(self.file_backend, runner.message_hub, self.out_dir)
        if is_main_process():
            self._remove_outdated()
            if self.backend_args == dict(backend=_BACKEND):
                for folder in {self.out_dir, runner.work_dir}:
                    if found := remove_unfinished(folder):
                        runner.logger.info(f'removed {found} unfinished files that a killed run '
                                           f'left in {folder}')

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        # the stock hook writes the pointer in place, into the runner's work folder
        with tempfile.TemporaryDirectory() as elsewhere:
            super()._save_checkpoint_with_step(_WithWorkDir(runner, elsewhere), step, meta)
        if is_main_process():
            WholeFileBackend().put(self.last_ckpt.encode(), Path(runner.work_dir, LAST_CHECKPOINT))
            self._remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        if is_main_process():
            self._remove_outdated()

    def _remove_outdated(self) -> None:
        best = getattr(self, 'best_ckpt_path_dict', {}).values()
        self.file_backend.remove_now(
            {self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best})


def use_whole_checkpoints(cfg: Config) -> None:
    """Let a config that imports this package save through `WholeCheckpointHook`.

    Where another hook than the stock one is asked for, that is kept.

    Args:
        cfg: Any config; changed in place.
    """
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    package = __name__.partition('.')[0]
    if not any(name.partition('.')[0] == package
               for name in ([imports] if isinstance(imports, str) else imports)):
        return  # what the runner notes as its config must be complete
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if hook and hook.get('type') in (CheckpointHook, 'CheckpointHook', 'mmengine.CheckpointHook'):
        hook['type'] = WholeCheckpointHook.__name__


class _RemovesLater:
    """A storage backend that notes what is to be removed, and removes it when told to.

    The notes are in the message hub as well: the checkpoint that is written
    next holds them, and who resumes from it can make up for the removal.

    Args:
        backend: Of MMEngine.
        message_hub: The runner's.
        folder: Where everything is that will be removed.
    """

    def __init__(self, backend: Any, message_hub: MessageHub, folder: str) -> None:
        self._backend, self._message_hub = backend, message_hub
        self._outdated = [backend.join_path(folder, name)
                          for name in message_hub.get_info(_OUTDATED, [])]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._outdated.append(path)
        self._message_hub.update_info(_OUTDATED, [os.path.basename(p) for p in self._outdated])

    rmtree = remove

    def remove_now(self, kept: set[str | None]) -> None:
        """Remove what was noted, but not what has been written anew under its old name."""
        if not self._outdated:
            return
        for path in self._outdated:
            if path in kept:
                continue
            if self._backend.isfile(path):
                self._backend.remove(path)
            elif self._backend.isdir(path):  # sharded ones are folders
                self._backend.rmtree(path)
        self._outdated = []
        self._message_hub.update_info(_OUTDATED, [])


class _WithWorkDir:
    """A runner as seen by whoever is to write into another work folder."""

    def __init__(self, runner: Runner, work_dir: str) -> None:
        self._runner, self.work_dir = runner, work_dir

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)
