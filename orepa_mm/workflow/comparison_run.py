"""One run of a comparison, as a process of its own: train, test both forms, write the result."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from ..analysis.measure import count_parameters
from ..engine import (
    add_config_arguments,
    bare_model,
    build_runner,
    build_test_runner,
    load_config,
)
from ..engine.metrics import tested_metrics
from ..errors import CheckpointError, ConfigError, NothingToConvertError, VerificationError
from ..files import written_whole
from ..reparam import is_training_form
from .curves import read_scalars
from .deploy import reparameterize_checkpoint
from .evidence import machine_of
from .summary import FORMS

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock there, and no peak of memory
    fcntl = resource = None

#: What lies in the folder of a run.
CONFIG, TRAINED, RESULT, LOG, LOCK = 'config.py', 'train', 'result.json', 'log.txt', 'lock'
#: Seconds between two looks at the parent.
_LOOK = 1.0
#: In place of what was not logged.
_UNKNOWN = {0: math.nan}


def run_variant(folder: str | Path) -> dict[str, Any]:
    """Train the config of a folder, test it, and write `result.json` there.

    A training that was interrupted goes on from its newest checkpoint.

    Args:
        folder: Of the run; it holds `config.py`.

    Returns:
        The content of `result.json`.

    Raises:
        FileExistsError: If another process trains this run.
        ConfigError: If the training left no checkpoint.
    """
    folder = Path(folder).resolve()
    with _alone(folder / LOCK):
        result = _trained_and_tested(folder)
        with written_whole(folder / RESULT) as path:
            path.write_text(json.dumps(result, indent=1))
    return result


def _trained_and_tested(folder: Path) -> dict[str, Any]:
    start = time.time()
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    cfg = load_config(parser.parse_args([str(folder / CONFIG), '--work-dir',
                                         str(folder / TRAINED)]))
    earlier = find_latest_checkpoint(str(folder / TRAINED)) is not None
    cfg.resume = earlier
    if earlier:
        cfg.load_from = None  # what the run started from; MMEngine would resume that
    runner = build_runner(cfg)
    training_form = is_training_form(bare_model(runner))
    parameters = count_parameters(bare_model(runner))
    runner.train()
    peak = _peak_bytes()
    checkpoint = find_latest_checkpoint(str(folder / TRAINED))
    if checkpoint is None:
        raise ConfigError('the training left no checkpoint: give the config a '
                          'default_hooks.checkpoint that saves the last')
    try:
        scalars = read_scalars(folder / TRAINED)
    except FileNotFoundError:  # a visualizer that writes elsewhere
        scalars = {}
    metrics, largest = _tested(cfg, checkpoint, folder, training_form)
    return {
        'metrics': metrics,
        'largest_difference': largest,
        'parameters': parameters,
        'iterations': runner.iter,
        'seconds_per_iteration': statistics.median(scalars.get('time', _UNKNOWN).values()),
        'peak_bytes': None if earlier else peak,  # a part of a run does not tell
        'kernel_step': statistics.fmean(scalars.get('kernel_step', _UNKNOWN).values()),
        'seconds': time.time() - start,  # of the last process
        'checkpoint': str(Path(checkpoint).relative_to(folder)),
        'machine': machine_of(bare_model(runner)),
    }


def _tested(cfg: Config, checkpoint: str, folder: Path, training_form: bool
            ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Metrics of both forms, and the largest differences; a plain network has one form."""
    if training_form:
        shutil.rmtree(folder / 'deployed', ignore_errors=True)  # of a run that was killed here
        report = reparameterize_checkpoint(cfg, checkpoint, folder / 'deployed', latency_rounds=1)
        return report['metrics'], report['largest_difference']
    runner = build_test_runner(cfg, checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        return {FORMS[1]: tested_metrics(runner, temporary)}, {}


def _end_with(parent: int) -> None:
    """End this process once another one is no longer its parent: that was killed.

    Else the training would go on, and keep the same command from going on with it.
    """
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Refuse to work where another process does; the lock goes with the process."""
    with path.open('w') as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f'another process works in {path.parent}') from None
        yield


def _peak_bytes() -> int | None:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == '__main__':
    if sys.argv[2:]:
        _end_with(int(sys.argv[2]))
    try:
        run_variant(sys.argv[1])
    except (CheckpointError, ConfigError, NothingToConvertError, VerificationError,
            FileExistsError, FileNotFoundError) as error:
        sys.exit(f'error: {error}')
