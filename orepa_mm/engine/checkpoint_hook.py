"""Checkpoints that survive a kill at any moment: the hook that writes them."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..checkpoints import load_checkpoint, model_state_dict
from ..checkpoints.expansion import without_wrappers
from ..checkpoints.io import is_finite
from ..errors import CheckpointError, ConfigError, DivergedError, shortened
from ..files import remove_unfinished, written_whole

#: Where MMEngine notes which checkpoint is the last, inside the work folder.
LAST_CHECKPOINT = 'last_checkpoint'
#: Under which name MMEngine's file functions find `WholeFileBackend`.
_BACKEND = 'orepa_mm_whole'


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

    Needed: disk space for one more checkpoint while one is written. On a storage
    that is no local folder, a file is written as that storage does. What
    `published_keys` publishes after the training is written as the stock hook
    does, in place.

    A run whose weights become NaN or infinite is stopped: they are looked at
    before each checkpoint and after each validation, and as soon as the loss is not
    finite. The loss is that of MMEngine's log, which is on the host already, so
    that no device is waited for in between. A loss that alone is not finite stops
    nothing: in mixed precision the step is skipped.

    Args:
        check_finite: Whether weights are looked at.
        **options: Those of the stock hook.

    Raises:
        ConfigError: If there is no such option.
        DivergedError: In training; it names the last good checkpoint.

    Example:
        >>> default_hooks = dict(checkpoint=dict(type='WholeCheckpointHook'))
    """

    #: What takes its place in a config that is to do without this package.
    stock_type = 'CheckpointHook'
    #: What the stock hook does not take.
    own_options = ('check_finite',)

    def __init__(self, *args: Any, check_finite: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.args:  # the stock hook would fail with them at the first checkpoint
            raise ConfigError('the checkpoint hook (default_hooks.checkpoint) has no option '
                              f'{shortened(list(self.args))}: correct the name, or leave it out')
        self.check_finite = check_finite

    def before_train(self, runner: Runner) -> None:
        """Find out where to write, and remove what a killed run left there.

        Args:
            runner: The runner.
        """
        super().before_train(runner)
        start = f' ({runner._load_from})' if runner._load_from else ''
        self._require_finite(runner, f'the weights that the training starts from{start} are not '
                             'finite')
        if self.file_client_args is None and type(self.file_backend) is LocalBackend:
            self.backend_args = dict(backend=_BACKEND)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # of any length, see below
        if is_main_process() and self.backend_args == dict(backend=_BACKEND):
            for folder in {self.out_dir, runner.work_dir}:
                if found := remove_unfinished(folder):
                    runner.logger.info(f'removed {found} unfinished files that a killed run '
                                       f'left in {folder}')

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Stop a run that has diverged; save what the stock hook saves.

        Args:
            runner: The runner.
            *args: As of the stock hook.
            **kwargs: As of the stock hook.

        Raises:
            DivergedError: If neither the loss nor the weights are finite.
        """
        loss = runner.message_hub.log_scalars.get('train/loss')
        if loss is not None and not math.isfinite(loss.current()):
            self._require_finite(runner, 'the training has diverged: the loss is '
                                 f'{loss.current()} in iteration {runner.iter + 1}')
        super().after_train_iter(runner, *args, **kwargs)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        self._require_finite(runner, 'the training has diverged')
        number = self.max_keep_ckpts
        if number > 0:  # the stock hook removes the oldest one first: let it have one more
            self.max_keep_ckpts += 1
        try:
            # the stock hook writes the pointer in place, into the runner's work folder
            with tempfile.TemporaryDirectory() as elsewhere:
                super()._save_checkpoint_with_step(_WithWorkDir(runner, elsewhere), step, meta)
        finally:
            self.max_keep_ckpts = number
        if is_main_process():
            WholeFileBackend().put(self.last_ckpt.encode(), Path(runner.work_dir, LAST_CHECKPOINT))
        while 0 < number < len(self.keep_ckpt_ids):
            name = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            self._remove(self.file_backend.join_path(self.out_dir, name))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        self._require_finite(runner, 'the training has diverged')
        # the stock hook removes an old one first, if it knows of it
        path, self.best_ckpt_path = getattr(self, 'best_ckpt_path', None), None
        paths = getattr(self, 'best_ckpt_path_dict', {})
        self.best_ckpt_path_dict = dict.fromkeys(paths)
        super()._save_best_checkpoint(runner, metrics)
        self.best_ckpt_path = self._replaced(path, self.best_ckpt_path)
        self.best_ckpt_path_dict = {key: self._replaced(paths[key], new)
                                    for key, new in self.best_ckpt_path_dict.items()}

    def _replaced(self, old: str | None, new: str | None) -> str | None:
        """The best checkpoint, without the one that it was before."""
        if old and new and old != new:
            self._remove(old)
        return new or old

    def _remove(self, path: str) -> None:
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # sharded ones are folders
            self.file_backend.rmtree(path)

    def _require_finite(self, runner: Runner, problem: str) -> None:
        """Refuse to go on with weights that are lost; `problem` begins the error."""
        names = non_finite_weights(without_wrappers(runner.model)) if self.check_finite else []
        if not names:
            return
        good = _last_good_checkpoint(runner.work_dir)
        start = (f'The last good checkpoint is {good}: start from it (--cfg-options '
                 f'load_from={shlex.quote(good)})' if good else
                 f'There is no good checkpoint in {runner.work_dir}: start anew')
        raise DivergedError(
            f'{problem}; NaN or Inf is in {shortened(names)}. Nothing was saved of that. {start} '
            'with a lower learning rate, a longer warm-up or clipped gradients '
            '(optim_wrapper.clip_grad.max_norm=10), in mixed precision with bfloat16. '
            'default_hooks.checkpoint.check_finite=False lets a run go on')


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of parameters and of running statistics that hold NaN or Inf.

    A device is waited for once. Other buffers may hold what they like: a mask is
    infinite.

    Args:
        model: Any.
    """
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers()
        if name.endswith(('running_mean', 'running_var'))}
    flags = {name: tensor.detach().isfinite().all() for name, tensor in tensors.items()
             if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta}
    if not flags:
        return []
    device = next(iter(flags.values())).device
    finite = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return [name for name, good in zip(flags, finite) if not good]


def _last_good_checkpoint(work_dir: str | Path) -> str | None:
    """What `last_checkpoint` names, if it is a whole file of finite weights."""
    try:
        path = Path(work_dir, LAST_CHECKPOINT).read_text(errors='replace').strip()
        state = model_state_dict(load_checkpoint(path))
    except (OSError, CheckpointError):
        return None
    return path if all(map(is_finite, state.values())) else None


def use_whole_checkpoints(cfg: Config) -> None:
    """Let a config that imports this package save through `WholeCheckpointHook`.

    Where another hook than the stock one is asked for, that is left.

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


class _WithWorkDir:
    """A runner as seen by whoever is to write into another work folder."""

    def __init__(self, runner: Runner, work_dir: str) -> None:
        self._runner, self.work_dir = runner, work_dir

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)
