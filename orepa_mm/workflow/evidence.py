"""What two forms are compared on, and what a checkpoint then says about itself."""

from __future__ import annotations

import copy
import platform
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..backbones.registration import PACKAGES
from ..files import sha256
from ..reparam import VerificationReport
from ..version import __version__


def built_model(cfg: Config) -> nn.Module:
    """The model of a config, as its runner builds it.

    Args:
        cfg: A config; MMPretrain's has the data preprocessor beside the model.
    """
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        return MODELS.build(model)


def config_of_files(path: str | Path, cfg: Config, name: str) -> Config:
    """The config of a deployed model, to test with in the same process as another.

    Args:
        path: That `config.py`.
        cfg: The training config: work folder and launcher are taken from it.
        name: Tells its visualizer from others: MMEngine keeps one for each name, with the
            folder of the first.
    """
    deployed = Config.fromfile(path)
    deployed.work_dir, deployed.launcher = cfg.work_dir, cfg.launcher
    if deployed.get('visualizer'):
        deployed.visualizer.name = f'{deployed.visualizer.get("name", "")}-{name}'
    return deployed


def first_images(loader: DataLoader, model: nn.Module, count: int) -> list[dict]:
    """The first test images, preprocessed, without augmentation.

    Args:
        loader: Of the test set.
        model: Its data preprocessor is used.
        count: How many images; the last batch is cut.

    Returns:
        Batches as the model takes them.
    """
    batches: list[dict] = []
    for data in loader:
        batch = model.data_preprocessor(data, False)
        images = len(batch['inputs'])
        batches.append({key: value[:count] if isinstance(value, (Tensor, list)) else value
                        for key, value in batch.items()} if images > count else batch)
        count -= images
        if count <= 0:
            break
    return batches


def largest_differences(verification: VerificationReport) -> dict[str, float]:
    """The largest error of the raw outputs, in float32, and that of a stored tensor.

    Args:
        verification: How two forms compare.
    """
    found = {'float32': verification.errors, 'tensors': verification.tensors}
    return {kind: max(error.error for error in errors) for kind, errors in found.items() if errors}


def machine_of(model: nn.Module) -> dict[str, Any]:
    """What ran a model; plain types, for a file.

    Args:
        model: Where it lies is what is named.
    """
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return {'torch': torch.__version__, 'threads': torch.get_num_threads(), 'device': name,
            'processor': platform.machine()}


def checkpoint_meta(model: nn.Module, checkpoint: Path, report: Mapping[str, Any], dataset: Any
                    ) -> dict[str, Any]:
    """What a written checkpoint says about itself; plain types only.

    Args:
        model: What is written, for its classes.
        checkpoint: The file that it was made from.
        report: `form`, `package`, `verification` and `largest_difference`.
        dataset: Whose classes are taken if the model has none; may be None.
    """
    verification = report['verification']
    classes = getattr(model, 'dataset_meta', None) or {
        key: value for key, value in (getattr(dataset, 'metainfo', None) or {}).items()
        if key in ('classes', 'palette')}
    return {
        'form': report['form'],
        'source': checkpoint.name,
        'source_sha256': sha256(checkpoint),
        'versions': {'orepa_mm': __version__, 'torch': torch.__version__.split('+')[0],
                     **{name: import_module(name).__version__
                        for name in ('mmengine', 'mmcv', *(
                            name for name, (package, *_) in PACKAGES.items()
                            if package == report['package']))}},
        'verified': verification['passed'],
        'largest_difference': dict(report['largest_difference']),
        'verification': verification,
        **({'dataset_meta': classes} if classes else {}),  # inferencers fail at a None
    }
