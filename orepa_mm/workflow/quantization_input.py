"""What int8 is made from, and what is refused before long work."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_distributed
from mmengine.registry import DATASETS, DefaultScope
from torch import nn
from torch.utils.data import ConcatDataset

from ..datasets.config_walk import find_datasets, spread
from ..errors import ConfigError
from ..export.onnx.quantize import METHODS

_HOW = 'write the folder with `mim run orepa_mm reparam ... --form folded --onnx`'


def calibration_batches(cfg: Config, model: nn.Module, number: int) -> list[dict]:
    """Training images, through the test pipeline, one in a batch.

    Args:
        cfg: The training config.
        model: Its data preprocessor is used.
        number: How many, spread evenly; all if there are fewer.

    Raises:
        ConfigError: If the config has no training images or no test pipeline.
    """
    training, testing = (find_datasets(cfg, [split]) for split in ('train', 'test'))
    if not training or not testing or not testing[0].get('pipeline'):
        raise ConfigError('int8 is calibrated on training images that pass the test pipeline: the '
                          'config needs train_dataloader.dataset and '
                          'test_dataloader.dataset.pipeline')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        images = ConcatDataset([DATASETS.build({
            **copy.deepcopy(dict(dataset)), 'pipeline': copy.deepcopy(testing[0]['pipeline']),
            'test_mode': True}) for dataset in training])
        return [model.data_preprocessor(pseudo_collate([images[index]]), False)
                for index in spread(len(images), number)]


def batches_of_size(batches: Sequence[dict], path: Path) -> list[dict]:
    """The batches whose images have the size that a network is for.

    Args:
        batches: From `calibration_batches`.
        path: The ONNX file of the network.

    Raises:
        ConfigError: If there are none.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    size = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[2:]]
    fitting = [batch for batch in batches
               if not all(size) or list(batch['inputs'].shape[2:]) == size]
    if not fitting:
        raise ConfigError(f'the network takes images of {size[0]} x {size[1]} pixels only, and '
                          'none of the training images has this size after the test pipeline')
    return fitting


def require_sense(calibration_images: int, max_drop: float | None, methods: Sequence[str]) -> None:
    """Refuse arguments of `quantize_deployed` that make no sense.

    Args:
        calibration_images: How many.
        max_drop: The largest drop that is let pass.
        methods: To choose from.

    Raises:
        ConfigError: It says which argument.
    """
    if calibration_images < 1:
        raise ConfigError(f'int8 needs images to calibrate on, not {calibration_images}')
    if max_drop is not None and not 0 <= max_drop < 1:
        raise ConfigError('the largest drop of the metric is a fraction of 1, as 0.005, not '
                          f'{max_drop:g}')
    unknown = sorted(set(methods) - set(METHODS))
    if unknown or not methods:
        raise ConfigError(f'there is no calibration method {unknown[0] if unknown else "given"}, '
                          f'only {", ".join(METHODS)}')
    if is_distributed():
        raise ConfigError('int8 is made and tested by one process: leave out --launcher')


def require_folded(path: Path) -> None:
    """Refuse a network that is missing, damaged, or whose BN is not folded.

    Args:
        path: The ONNX file.

    Raises:
        FileNotFoundError: If there is none.
        ConfigError: If it is damaged, or in another form.
    """
    import onnx

    if not path.is_file():
        raise FileNotFoundError(f'there is no {path}: {_HOW}')
    try:
        meta = {item.key: item.value for item in onnx.load(str(path)).metadata_props}
    except Exception as error:  # of the protobuf library, of many kinds
        raise ConfigError(f'{path} cannot be read as ONNX ({error}): {_HOW}') from error
    if meta.get('form') != 'folded':
        raise ConfigError(f'{path} is in {meta.get("form", "unknown")} form, and int8 needs BN to '
                          f'be folded: {_HOW}')
