"""A hook that validates what will be deployed, not what is trained."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..errors import ConfigError, VerificationError
from ..reparam import VerificationReport, is_training_form, reparameterize, verify
from .launch import bare_model


@HOOKS.register_module()
class ReparamTestHook(Hook):
    """Validate and test with the deployed form of the model.

    A re-parameterized copy takes the place of `runner.model` while a batch is
    validated or tested: it is made at the first batch of each validation, and of
    the averaged weights where an `EMAHook` has put them in. Whatever runs before
    and after, other hooks and an exception among it, meets the training form.
    Training goes on bit for bit as without the hook, and checkpoints hold the
    training form.

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

    #: An EMAHook (NORMAL) puts its weights back before this one may stop the run.
    priority = 'LOW'

    def __init__(self, verify_batches: int = 1, stop_on_difference: bool = False) -> None:
        if isinstance(verify_batches, bool) or not isinstance(verify_batches, int) \
                or verify_batches < 0:
            raise ValueError('ReparamTestHook: verify_batches must be an integer that is not '
                             f'negative, got {verify_batches!r}')
        self.verify_batches = verify_batches
        self.stop_on_difference = stop_on_difference
        self._enabled = False
        #: The copy, during a validation.
        self._deployed: nn.Module | None = None
        #: What the comparisons of this validation found wrong, in this process.
        self._complaints: list[str] = []

    def before_run(self, runner: Runner) -> None:
        """Fail now where the first validation would fail hours later.

        Args:
            runner: The runner, its model in training form.

        Raises:
            NothingToConvertError: If the model has nothing to re-parameterize.
                It is a `ValueError`.
            ConfigError: If there are two of these hooks.
        """
        if [type(hook) for hook in runner.hooks].count(type(self)) > 1:
            raise ConfigError('there are two ReparamTestHooks in custom_hooks: remove one')
        with _same_random_numbers():
            reparameterize(runner.model)  # one try
        self._enabled = is_training_form(runner.model)
        if not self._enabled:
            runner.logger.warning('ReparamTestHook has nothing to do: the model is in deploy form '
                                  'already. Remove the hook from custom_hooks.')
            return
        for loop in (runner._val_loop, runner._test_loop):
            if isinstance(loop, BaseLoop) and not hasattr(loop, 'run_iter'):
                runner.logger.warning(f'ReparamTestHook does nothing in {type(loop).__name__}, '
                                      'which has no run_iter: the training form is validated')
            elif isinstance(loop, BaseLoop) and not hasattr(loop.run_iter, 'deploys'):
                loop.run_iter = self._deploying(loop.run_iter, runner)

    def _deploying(self, run_iter: Callable[..., Any], runner: Runner) -> Callable[..., Any]:
        """A loop's method for one batch, to which `runner.model` is the deployed form."""
        @functools.wraps(run_iter)
        def deploying(idx: int, data_batch: Any) -> Any:
            model = runner.model
            if idx == 0 or self._deployed is None:
                with _same_random_numbers():
                    # takes off the wrapper of a distributed run, which is for gradients only
                    self._deployed = reparameterize(model)
            if idx < self.verify_batches:
                self._compare(runner, bare_model(runner), self._deployed, idx, data_batch)
            runner.model = self._deployed
            try:
                return run_iter(idx, data_batch)
            finally:
                runner.model = model

        deploying.deploys = True  # type: ignore[attr-defined]  # a mark, for a second run
        return deploying

    def before_val_epoch(self, runner: Runner) -> None:
        """Forget an earlier validation, which an exception may have ended.

        Args:
            runner: The runner.
        """
        self._deployed, self._complaints = None, []

    def before_test_epoch(self, runner: Runner) -> None:
        """As `before_val_epoch`.

        Args:
            runner: The runner.
        """
        self.before_val_epoch(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Free the copy.

        Args:
            runner: The runner.
            metrics: Of the deployed form; not used.

        Raises:
            VerificationError: With `stop_on_difference`, if outputs differed or
                could not be compared in any process.
        """
        self._deployed = None
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

    def _compare(self, runner: Runner, before: nn.Module, deployed: nn.Module, batch_idx: int,
                 data_batch: Any) -> None:
        try:
            if isinstance(deployed, BaseTTAModel):  # the first of the augmentations
                deployed = deployed.module
                data_batch = {key: value[0] for key, value in data_batch.items()}
            with _same_random_numbers(), torch.no_grad():
                # A copy: a preprocessor may work in place, and the loop calls it as well.
                batch = deployed.data_preprocessor(copy.deepcopy(data_batch), False)
                report = verify(before, deployed, [batch])
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
