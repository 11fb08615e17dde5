"""A model from the files that hold it: a folder that `reparam` wrote, or a config and a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import nn

from ..checkpoints import load_weights
from ..engine import find_config, read_config
from ..errors import CheckpointError, ConfigError
from .evidence import built_model

_CHECKPOINT_SUFFIXES = ('.pth', '.pt')


def load(path: str | Path, device: str = 'cpu') -> nn.Module:
    """Load a re-parameterized model, plain or folded.

    Args:
        path: A folder that `tools/reparam.py` or `reparameterize_checkpoint`
            wrote, with `config.py` and `model.pth`. Like every config,
            `config.py` is code that runs: load what you trust.
        device: Where to put the model, as PyTorch names it.

    Returns:
        The model as of `load_model`.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks one of the files.
        ConfigError: If the config is damaged or names no model, or there is no
            such device.
        CheckpointError: If the checkpoint is damaged, or not that of the config.
        ImportError: If a toolbox is missing that the model is made of.
    """
    config, checkpoint = deployed_files(path)
    return load_model(read_config(config), checkpoint, device)


def load_model(cfg: Config, checkpoint: str | Path, device: str = 'cpu') -> nn.Module:
    """Build the model of a config and load its weights strictly.

    Args:
        cfg: The config.
        checkpoint: A file of its weights, in the same form.
        device: Where to put the model, as PyTorch names it.

    Returns:
        The model in eval mode. It has `dataset_meta` (`classes`, maybe
        `palette`; those of the config's test set if the checkpoint names none)
        and its config as `cfg`, so that `inference_detector` of MMDetection,
        `inference_model` of MMSegmentation and `ImageClassificationInferencer`
        of MMPretrain take it.

    Raises:
        ConfigError: If the config names no model, or there is no such device.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: See `load_weights`.
        ImportError: If a toolbox is missing that the model is made of.
    """
    if not cfg.get('model'):
        raise ConfigError(f'the config {cfg.filename or ""} names no model: give the config that '
                          'the checkpoint was trained with')
    model = built_model(cfg)
    content = load_weights(model, checkpoint)
    known = (content.get('meta') or {}).get('dataset_meta') or _meta_of_test_set(cfg)
    model.dataset_meta = {key.lower(): value for key, value in known.items()}
    model.cfg = cfg
    # what MMPretrain's inferencers read instead
    model._config, model._dataset_meta = cfg, model.dataset_meta
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise ConfigError(f'the model cannot be put on the device {device!r}: {error}') from error
    return model.eval()


def deployed_files(folder: str | Path) -> tuple[Path, Path]:
    """Config and checkpoint of a re-parameterized model.

    Args:
        folder: A folder that `reparameterize_checkpoint` wrote.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks one of the files.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f'there is no folder {folder}: give one that '
                                '`mim run orepa_mm reparam` wrote, with config.py and model.pth')
    files = folder / 'config.py', folder / 'model.pth'
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f'{folder} has no {" and no ".join(missing)}: it is no folder that `mim run orepa_mm '
            'reparam` wrote. Of a model in training form give the config and the checkpoint')
    return files


def split_model_arguments(words: Sequence[str]) -> tuple[Path, Path, list[str]]:
    """Tell the files of a model from what follows them on a command line.

    Args:
        words: A folder that `reparam` wrote; or a config (a path, or the name
            of one of the package's own) and a checkpoint; then anything.

    Returns:
        The config, the checkpoint, and the words after them.

    Raises:
        ConfigError: If the first word is a checkpoint without a config.
        CheckpointError: If no checkpoint follows a config.
        FileNotFoundError: If the folder or the config is none.
    """
    first, *rest = words
    if Path(first).suffix in _CHECKPOINT_SUFFIXES:
        raise ConfigError(f'{first} is a checkpoint: give its config before it, or, of a '
                          're-parameterized model, the folder that it lies in')
    if Path(first).expanduser().is_dir():
        return *deployed_files(first), rest
    config = find_config(first)
    if not rest or Path(rest[0]).suffix not in _CHECKPOINT_SUFFIXES:
        raise CheckpointError(f'a checkpoint (.pth) must follow the config {first}, found '
                              f'{rest[0] if rest else "nothing"}')
    return config, Path(rest[0]).expanduser(), rest[1:]


def _meta_of_test_set(cfg: Config) -> dict[str, Any]:
    """Names of the classes as the config's test set has them; nothing of it is read."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        kind = DATASETS.get(dataset['type']) if isinstance(dataset.get('type'), str) else None
    return {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}
