"""What `train` asks for beside the config."""

from __future__ import annotations

from mmengine.config import Config
from mmengine.device import get_device

from ..errors import ConfigError
from .launch import require_loops
from .pretrained import check_pretrained


def use_training_options(cfg: Config, *, amp: bool = False, auto_scale_lr: bool = False,
                         resume: str | None = None) -> None:
    """Set what the options of `train` say, and refuse what could not be trained.

    Args:
        cfg: From `load_config`; changed in place.
        amp: Whether to train in automatic mixed precision: float16, or the `dtype`
            that the config's `optim_wrapper` says.
        auto_scale_lr: Whether to scale the learning rate with the batch size.
        resume: `auto` for the newest checkpoint in the work folder, or a file.

    Raises:
        ConfigError: If the config has nothing to train, or no base batch size to
            scale from, or asks for mixed precision where no device has it.
        FileNotFoundError: See `check_pretrained`.
    """
    require_loops(cfg, 'train')
    check_pretrained(cfg)
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if str(cfg.optim_wrapper.get('type')).endswith('AmpOptimWrapper') and (
            get_device() in ('cpu', 'mps')):  # MMEngine refuses both
        raise ConfigError('mixed precision (AmpOptimWrapper) needs a GPU, and PyTorch sees none: '
                          'leave --amp out, or set optim_wrapper.type=OptimWrapper')
    if auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ConfigError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if resume is not None:
        cfg.resume = True
        cfg.load_from = None if resume == 'auto' else resume
