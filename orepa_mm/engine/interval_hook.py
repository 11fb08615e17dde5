"""What the hooks share that measure every so many iterations."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner


class IntervalHook(Hook):
    """A hook that measures every so many iterations.

    Args:
        interval: Every how many.

    Raises:
        ValueError: If `interval` is no positive integer.
    """

    def __init__(self, interval: int) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f'{type(self).__name__}: interval must be a positive integer, got '
                             f'{interval!r}')
        self.interval = interval

    def measures(self, runner: Runner) -> bool:
        """Whether this iteration is one of them.

        Args:
            runner: The runner.
        """
        # not the first: a warm-up begins with a learning rate of almost nothing
        return (runner.iter + 1) % self.interval == 0
