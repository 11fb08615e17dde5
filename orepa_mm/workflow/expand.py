"""From a trained plain checkpoint to one in training form, with proof that it computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from ..backbones.registration import PACKAGES
from ..checkpoints import load_checkpoint, load_weights, model_state_dict
from ..checkpoints.forms import is_branch_key
from ..errors import CheckpointError, ConfigError, NothingToConvertError, VerificationError
from ..export.checkpoint import load_plain_weights
from ..export.stock import deploy_config, used_detector
from ..files import written_whole
from ..reparam import VerificationReport, is_training_form, verify
from ..reparam.verify import layers_with_branches
from .evidence import built_model, checkpoint_meta, first_images, largest_differences

#: Height and width of the noise that stands for images, in pixels.
_NOISE_SIZE = 224


@dataclass(frozen=True)
class Expansion:
    """What `expand_checkpoint` wrote.

    Attributes:
        expanded: Convolutions that became blocks.
        copied: Other tensors, which are as they were.
        verification: How the two forms compare.
        meta: What the checkpoint says about itself.
    """

    expanded: int
    copied: int
    verification: VerificationReport
    meta: dict[str, Any]


def expand_checkpoint(cfg: Config, checkpoint: str | Path, out: str | Path, *,
                      num_images: int = 4, images: bool = True) -> Expansion:
    """Write a plain checkpoint in training form, after a proof that it computes the same.

    Args:
        cfg: The training config, with OREPA, from `orepa_mm.engine.load_config`.
        checkpoint: Weights of the stock model of this config, as any runner of
            OpenMMLab saves them.
        out: File to write, whole or not at all.
        num_images: Test images on which the two forms are compared.
        images: Compare on the config's test images. Otherwise on random noise,
            as the checkpoint's `meta` then says: nothing is asked of a data set.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there is no checkpoint, or no data set.
        FileExistsError: If the output exists already.
        CheckpointError: If the checkpoint is no plain one of this model, or
            cannot be expanded.
        ConfigError: If the config has no plain counterpart, or no test images.
        NothingToConvertError: If the config's model has no OREPA layer.
        VerificationError: If the two forms do not compute the same.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists():
        raise FileExistsError(f'{out} exists already: nothing is overwritten')
    source = load_checkpoint(checkpoint)
    plain, model = built_model(deploy_config(cfg)), built_model(cfg)
    if not is_training_form(model):
        raise NothingToConvertError(
            "the config's model has nothing to expand into. Give the config of the training to "
            "come, e.g. with backbone=dict(type='OREPAResNet', ...) or conv_cfg=dict(type='OREPA')")
    _require_plain(used_detector(model), model_state_dict(source), checkpoint)
    load_weights(plain, checkpoint)
    expanded = load_plain_weights(model, plain.state_dict(), str(checkpoint))
    dataset_meta = (source.get('meta') or {}).get('dataset_meta')
    if dataset_meta is not None:
        model.dataset_meta = dataset_meta
    for form in (model, plain):
        form.to(get_device())
        form.eval()  # a statement of its own: not every backbone's train() returns itself
    used = used_detector(model)
    loader = _test_loader(cfg) if images else None
    batches = first_images(loader, used, num_images) if images else [_noise(model)]
    verification = verify(used, plain, batches)
    if not verification.passed:
        raise VerificationError('the expanded model does not compute the same function, nothing '
                                f'was saved.\n{verification.explain()}')
    meta = checkpoint_meta(model, checkpoint, {
        'form': 'training', 'package': PACKAGES.get(cfg.get('default_scope'), ('',))[0],
        'verification': verification.as_dict(),
        'largest_difference': largest_differences(verification),
    }, loader and loader.dataset)
    count = sum(len(batch['inputs']) for batch in batches)
    meta.update(verified_on=f'{count} test images' if images else 'random noise',
                cfg=cfg.pretty_text)
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    with written_whole(out) as path:
        torch.save({'meta': meta, 'state_dict': state}, path)
    copied = len(used.state_dict().keys() & plain.state_dict().keys())
    return Expansion(expanded, copied, verification, meta)


def _require_plain(model: nn.Module, state: dict, checkpoint: Path) -> None:
    """Refuse a checkpoint with branches; one of another kind is for `load_weights` to refuse."""
    layers = layers_with_branches(model)
    branch = next((key for key in state if is_branch_key(key) and any(
        key.startswith(f'{name}.') for name in layers)), None)
    if branch is None:
        return
    kernel = next((f'{name}.weight' for name in layers if f'{name}.weight' in state), None)
    if kernel is not None:
        raise CheckpointError(
            f'{checkpoint} is half plain, half in training form: {kernel} is a plain kernel, and '
            f'{branch} a branch. Give a checkpoint that is plain as a whole')
    raise CheckpointError(
        f'{checkpoint} is in training form already (it has {branch}): there is nothing to expand. '
        f'Train on from it with --cfg-options load_from={checkpoint}')


def _test_loader(cfg: Config) -> Any:
    if not cfg.get('test_dataloader'):
        raise ConfigError('the config has no test_dataloader to take images from: compare on '
                          'random noise with --no-images')
    try:
        return Runner.build_dataloader(cfg.test_dataloader)
    except (FileNotFoundError, AssertionError) as error:  # the latter is MMSegmentation's
        raise FileNotFoundError(
            f"the test images of the config cannot be read ({error}). Say where they are with "
            '--data-root, or compare on random noise with --no-images') from error


def _noise(model: nn.Module) -> dict[str, Any]:
    """A batch of two images of noise, as a data preprocessor returns it."""
    size = (_NOISE_SIZE, _NOISE_SIZE)
    inputs = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
    samples = [BaseDataElement(metainfo={**shapes, 'scale_factor': (1.0, 1.0)}) for _ in inputs]
    return {'inputs': inputs.to(next(model.parameters()).device), 'data_samples': samples}
