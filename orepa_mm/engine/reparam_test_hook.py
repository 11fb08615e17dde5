"""A hook that validates what will be deployed, not what is trained."""

from __future__ import annotations

import copy
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..checkpoints.expansion import without_wrappers
from ..errors import ConfigError, VerificationError
from ..reparam import VerificationReport, is_training_form, reparameterize, verify
from .launch import bare_model


@HOOKS.register_module()
class ReparamTestHook(Hook):
    """Validate and test with the deployed form of the model.

    Before every validation and test epoch a re-parameterized copy takes the
    place of `runner.model`; afterwards, and also if the epoch is left by an
    exception, the training form is back. It is not touched meanwhile: it even
    stays in training mode, where a plain validation leaves it in eval mode.
    Training goes on bit for bit as without the hook, and checkpoints hold the
    training form. With an `EMAHook` the copy is made of the averaged weights.

    The raw outputs of both forms are compared on the first batches of every
    validation. A difference is logged as an error, and the run goes on: the
    weights that are trained are right, a checkpoint of them can be converted
    anew, and hours of training are worth more than a wrong number in the log.

    Needed while it runs: memory for one more model, and for two beside it
    during the comparison.

    Args:
        verify_batches: How many batches of each validation both forms are
            compared on; 0 for none. Negative or no integer is an error.
        stop_on_difference: Stop where the forms differ or cannot be compared,
            instead of only logging an error: at the end of that validation, in
            all processes, whichever of them saw it.

    Raises:
        ValueError: If `verify_batches` is no number of batches.

    Example:
        >>> custom_hooks = [dict(type='ReparamTestHook')]
    """

    #: After whatever changes weights for a validation (`EMAHook` is NORMAL),
    #: before whatever saves them (`CheckpointHook` is VERY_LOW).
    priority = 'LOW'

    def __init__(self, verify_batches: int = 1, stop_on_difference: bool = False) -> None:
        if isinstance(verify_batches, bool) or not isinstance(verify_batches, int) \
                or verify_batches < 0:
            raise ValueError('ReparamTestHook: verify_batches must be an integer that is not '
                             f'negative, got {verify_batches!r}')
        self.verify_batches = verify_batches
        self.stop_on_difference = stop_on_difference
        self._enabled = False
        #: While a copy is in its place: the runner's model, and what is in its wrappers.
        self._training_model: nn.Module | None = None
        self._before: nn.Module | None = None
        #: What the comparisons of this validation found wrong, in this process.
        self._complaints: list[str] = []

    # --- before anything is trained ------------------------------------------

    def before_run(self, runner: Runner) -> None:
        """Fail now where the first validation would fail hours later.

        Args:
            runner: The runner, its model in training form.

        Raises:
            NothingToConvertError: If the model has nothing to re-parameterize.
                It is a `ValueError`.
            ConfigError: If another hook runs on the wrong side of this one.
        """
        self._require_order(runner)
        with _same_random_numbers():
            reparameterize(runner.model)  # one try
        self._enabled = is_training_form(runner.model)
        if not self._enabled:
            runner.logger.warning('ReparamTestHook has nothing to do: the model is in deploy form '
                                  'already. Remove the hook from custom_hooks.')
        for loop in (runner._val_loop, runner._test_loop):
            if isinstance(loop, BaseLoop):
                self._guard(loop, runner)

    def _require_order(self, runner: Runner) -> None:
        position = runner.hooks.index(self)
        for index, hook in enumerate(runner.hooks):
            name = f'{type(hook).__name__} (priority {hook.priority})'
            ours = f'ReparamTestHook (priority {self.priority})'
            if isinstance(hook, ReparamTestHook) and hook is not self:
                raise ConfigError('there are two ReparamTestHooks in custom_hooks: remove one')
            if isinstance(hook, EMAHook):
                if index > position:
                    raise ConfigError(
                        f'{name} runs after {ours}: the deployed form would be made of weights '
                        "that are not averaged. Give the EMAHook its own priority, 'NORMAL', or "
                        "ReparamTestHook one that comes later, e.g. priority='LOW'.")
                if getattr(hook, 'evaluate_on_ema', False) and \
                        getattr(hook, 'evaluate_on_origin', False):
                    raise ConfigError(
                        f'{name} validates a second time inside of one validation, which would '
                        'be done with the deployed form of the averaged weights again. Set '
                        'evaluate_on_origin=False, or remove ReparamTestHook.')
            if isinstance(hook, CheckpointHook) and index < position:
                raise ConfigError(
                    f'{name} runs before {ours}: save_best would save the deployed form. Give '
                    "the CheckpointHook its own priority, 'VERY_LOW', or ReparamTestHook one "
                    "that comes earlier, e.g. priority='LOW'.")

    def _guard(self, loop: BaseLoop, runner: Runner) -> None:
        """Put the training form back also if the loop is left by an exception.

        No hook is called then, and who catches it, e.g. a KeyboardInterrupt in
        a notebook, would go on with the copy.
        """
        run = loop.run
        if getattr(run, 'guarded_by', None) is self:
            return

        @functools.wraps(run)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            finally:
                self._put_back(runner)

        guarded.guarded_by = self
        loop.run = guarded

    # --- the exchange --------------------------------------------------------

    def before_val_epoch(self, runner: Runner) -> None:
        """Let the deployed form take the place of the training form.

        Args:
            runner: The runner.
        """
        self._put_copy(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """As `before_val_epoch`.

        Args:
            runner: The runner.
        """
        self._put_copy(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Put the training form back and free the copy.

        Args:
            runner: The runner.
            metrics: Of the deployed form; not used.

        Raises:
            VerificationError: With `stop_on_difference`, if outputs differed or
                could not be compared in any process.
        """
        self._put_back(runner)
        self._stop_if_asked_for()

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """As `after_val_epoch`.

        Args:
            runner: The runner.
            metrics: Of the deployed form; not used.

        Raises:
            VerificationError: See `after_val_epoch`.
        """
        self.after_val_epoch(runner, metrics)

    def _put_copy(self, runner: Runner) -> None:
        if not self._enabled:
            return
        with _same_random_numbers():
            # Takes off the wrapper of a distributed run, which is for gradients only.
            deployed = reparameterize(runner.model)
        self._training_model, self._before = runner.model, bare_model(runner)
        if hasattr(self._before, 'semi_test_cfg'):  # TeacherStudentValLoop switches it as it goes
            without_wrappers(deployed).semi_test_cfg = self._before.semi_test_cfg
        self._complaints = []
        runner.model = deployed

    def _put_back(self, runner: Runner) -> None:
        if self._training_model is not None:
            runner.model = self._training_model
            self._training_model = self._before = None

    # --- the comparison ------------------------------------------------------

    def before_val_iter(self, runner: Runner, batch_idx: int,
                        data_batch: dict | tuple | list | None = None) -> None:
        """Compare both forms on this batch if it is one of the first.

        Args:
            runner: The runner, its model in deploy form.
            batch_idx: Number of the batch in this validation.
            data_batch: What the data loader gave; not changed.
        """
        if self._training_model is not None and batch_idx < self.verify_batches:
            self._compare(runner, batch_idx, data_batch)

    def before_test_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | tuple | list | None = None) -> None:
        """As `before_val_iter`.

        Args:
            runner: The runner, its model in deploy form.
            batch_idx: Number of the batch in this test.
            data_batch: What the data loader gave; not changed.
        """
        self.before_val_iter(runner, batch_idx, data_batch)

    def _compare(self, runner: Runner, batch_idx: int, data_batch: Any) -> None:
        before, after = self._before, bare_model(runner)
        try:
            if isinstance(runner.model, BaseTTAModel):  # the first of the augmentations
                data_batch = {key: value[0] for key, value in data_batch.items()}
            with _same_random_numbers(), torch.no_grad():
                # A copy: a preprocessor may work in place, and the loop calls it as well.
                batch = after.data_preprocessor(copy.deepcopy(data_batch), False)
                report = verify(before, after, [batch])
            if report.passed:
                runner.logger.info('training and deployed form agree on batch '
                                   f'{batch_idx}: {_largest_errors(report)}')
                return
            self._complain(runner, 'THE DEPLOYED FORM DIFFERS from the training form on batch '
                           f'{batch_idx}, do not trust the metrics of this epoch.\n'
                           f'{report.explain()}')
        except Exception as error:  # whatever a model does with it: only the check is lost
            self._complain(runner, 'THE DEPLOYED FORM COULD NOT BE COMPARED with the training '
                           f'form on batch {batch_idx}: {type(error).__name__}: {error}\n'
                           'verify_batches=0 switches the comparison off.', exc_info=True)

    def _complain(self, runner: Runner, message: str, exc_info: bool = False) -> None:
        runner.logger.error(message, exc_info=exc_info)
        self._complaints.append(message)

    def _stop_if_asked_for(self) -> None:
        """Raise in all processes, if one has reason to: the others would wait for it."""
        if not (self._enabled and self.stop_on_difference):
            return
        found = all_gather_object(self._complaints)
        messages = [complaint if len(found) == 1 else f'process {rank}: {complaint}'
                    for rank, complaints in enumerate(found) for complaint in complaints]
        if messages:
            raise VerificationError('\n'.join(messages))


def without_reparam_test(cfg: Config) -> Config:
    """The config without this hook: what validates the training form, or is stock.

    Args:
        cfg: Any config; left as it is.

    Returns:
        A new config.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.get('custom_hooks'):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks
                            if not isinstance(hook, dict) or not _is_reparam_test(hook['type'])]
    return cfg


def _is_reparam_test(kind: Any) -> bool:
    """Whether a config's `type` is this hook: the class, its name, with a scope or a module."""
    return kind is ReparamTestHook or (
        isinstance(kind, str) and kind.rpartition('.')[2] == ReparamTestHook.__name__)


def _largest_errors(report: VerificationReport) -> str:
    """The largest error of each dtype, and in which output."""
    largest = map(report.largest, sorted({error.dtype for error in report.errors}))
    return 'largest scale-relative errors ' + ', '.join(
        f'{error.error:.1e} ({error.name} in {error.dtype})' for error in largest)


def _same_random_numbers() -> AbstractContextManager:
    """Draws inside do not change what is drawn afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices)
