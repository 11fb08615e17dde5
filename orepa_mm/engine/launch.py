"""From a config to a runner."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_distributed, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from ..checkpoints import load_weights
from ..checkpoints.expansion import without_wrappers
from ..datasets.config_walk import dicts_with
from ..errors import ConfigError
from ..files import require_writable_folder
from .built_layers import log_built_layers
from .console import runner_class
from .image_size import describe_image_size
from .resume import FinalValidationHook, checkpoint_folders, newest_checkpoint

#: What each loop of a runner is made of.
_PARTS = {'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
          'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
          'test': ('test_dataloader', 'test_cfg', 'test_evaluator')}
#: What a launcher tells each process.
_LAUNCHED = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config; on the CPU, distributed runs work as well.

    The log says how many convolutions are re-parameterizable, and to which size
    images are brought; on the console it is short. A runner that is
    to resume without being told from where takes the newest whole checkpoint.

    Args:
        cfg: From `load_config`.

    Raises:
        CheckpointError: See `newest_checkpoint`.
        ConfigError: See `require_loops`; if no launcher started this process, though the
            config names one.
        OSError: If the work folder cannot be written to.
    """
    require_loops(cfg)
    _require_launched(cfg)
    require_writable_folder(cfg.work_dir)
    if (cfg.get('randomness') or {}).get('deterministic'):
        # cuBLAS reads it when CUDA starts; without it PyTorch refuses to multiply matrices
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if cfg.launcher in ('pytorch', 'slurm') and not torch.cuda.is_available():
        _prepare_cpu_processes(cfg)
    runner = runner_class(cfg).from_cfg(cfg)
    model = bare_model(runner)
    if isinstance(model, nn.Module):  # a FlexibleRunner builds it later
        log_built_layers(model, cfg.model)
    if size := describe_image_size(cfg):
        print_log(size, 'current')
    if cfg.get('resume') and not cfg.get('load_from'):
        path, problem = on_main_process(
            lambda: newest_checkpoint(runner.work_dir, checkpoint_folders(runner)))
        if problem:
            print_log(f'{problem}: going on from {path}, the newest whole checkpoint', 'current',
                      logging.WARNING)
        runner._load_from = path  # MMEngine would take what last_checkpoint names, unseen
    if cfg.get('resume'):
        runner.register_hook(FinalValidationHook())
    return runner


def build_test_runner(cfg: Config, checkpoint: str | Path) -> Runner:
    """Build a runner for testing whose model is loaded strictly.

    Args:
        cfg: From `load_config`.
        checkpoint: A local checkpoint file.

    Raises:
        CheckpointError: If the file does not belong to the config's model.
        ConfigError: If the config has nothing to test on.
    """
    require_loops(cfg, 'test')
    cfg.load_from = None
    cfg.resume = False
    runner = build_runner(cfg)
    model = bare_model(runner)
    checkpoint = load_weights(model, checkpoint)
    dataset_meta = (checkpoint.get('meta') or {}).get('dataset_meta')
    if dataset_meta is not None:
        model.dataset_meta = dataset_meta
    # Not through the runner: it would load again, and warn instead of failing.
    runner._has_loaded = True
    return runner


def require_loops(cfg: Config, *needed: str) -> None:
    """Refuse a config that lacks a part of what training, validation or testing takes.

    Args:
        cfg: Any config.
        needed: Which of `train`, `val` and `test` the config must have; the others
            it may lack as a whole.

    Raises:
        ConfigError: It names what is missing.
    """
    for split, keys in _PARTS.items():
        missing = [key for key in keys if cfg.get(key) is None]
        if missing and (split in needed or len(missing) < len(keys)):
            raise ConfigError(f'the config has no {" and no ".join(missing)}, which {split} needs: '
                              'set it' + ('' if split in needed else
                                          f', or set {", ".join(keys)} to None to do without'))


def bare_model(runner: Runner) -> nn.Module:
    """The runner's model, without the wrappers of a distributed run and of augmentation.

    Args:
        runner: Any runner.
    """
    return without_wrappers(runner.model)


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call a function in the main process; every process gets its result, or its error.

    Args:
        function: Its result must be small and picklable.
    """
    outcome: list = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except Exception as error:
            if not is_distributed():
                raise
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _require_launched(cfg: Config) -> None:
    name = _LAUNCHED.get(cfg.launcher)
    if name and name not in os.environ and not torch.distributed.is_initialized():
        raise ConfigError(
            f'--launcher {cfg.launcher} was given, but this process was not started by it ({name} '
            'is not set): start with tools/dist_train.sh, tools/slurm_train.sh or `mim train '
            '--launcher`, or leave --launcher out')


def _prepare_cpu_processes(cfg: Config) -> None:
    """Start gloo here: MMEngine's own way to it asks for a CUDA device."""
    if cfg.launcher == 'slurm':
        _say_what_torchrun_would()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    cfg.setdefault('model_wrapper_cfg', dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None))
    synced = [part for part in dicts_with('type', cfg.model) if part['type'] == 'SyncBN']
    for part in synced:
        part['type'] = 'BN'
    if synced:
        print_log('SyncBN works on GPUs only: on the CPU each process normalizes its own batch',
                  'current', logging.WARNING)


def _say_what_torchrun_would() -> None:
    """Name this process to PyTorch by what Slurm says of it, as MMEngine does for GPUs."""
    slurm = os.environ
    slurm.update(RANK=slurm['SLURM_PROCID'], WORLD_SIZE=slurm['SLURM_NTASKS'],
                 LOCAL_RANK=slurm.get('SLURM_LOCALID', '0'))
    slurm.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in slurm:
        hosts = subprocess.run(['scontrol', 'show', 'hostnames', slurm['SLURM_NODELIST']],
                               capture_output=True, text=True, check=True).stdout
        slurm['MASTER_ADDR'] = hosts.split()[0]
