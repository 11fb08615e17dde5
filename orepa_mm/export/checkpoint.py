"""An ImageNet checkpoint from one form to another: what other models load, or OREPA trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import (
    PUBLISHED,
    Architecture,
    convert_official_state_dict,
    expanded_state_dict,
    load_checkpoint,
    model_state_dict,
    read_classifier,
    recognize_architecture,
)
from ..checkpoints.architectures import build_backbone, plain_form_of
from ..checkpoints.official import read_plain_classifier
from ..errors import CheckpointError, shortened
from ..files import written_whole
from ..layers import reparam_layers
from ..reparam import reparameterize
from ..version import __version__

#: What a checkpoint can be converted to, and the name of the result in its `meta`.
CONVERTED_FORMS = {'training': 'training', 'deploy': 'plain', 'torchvision': 'torchvision'}


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint_file` wrote.

    Attributes:
        architecture: The network.
        form: A key of `CONVERTED_FORMS`.
        num_tensors: Tensors in the file.
        expanded: Convolutions of a plain source that became blocks.
    """

    architecture: Architecture
    form: str
    num_tensors: int
    expanded: int = 0


def convert_checkpoint_file(source: str | Path, target: str | Path, arch: str | None = None,
                            form: str = 'training') -> Conversion:
    """Convert a classifier's checkpoint file to another form.

    The file written holds `state_dict` and, under `meta`, its form, the
    network and the name of the source.

    Args:
        source: A file of the authors, or one that the runner saved of a
            classifier with one of our backbones, in training form. For the form
            `training` also a plain ResNet or ResNeXt of torchvision, timm or
            OpenMMLab, whose kernels are put into blocks.
        target: File to write, whole or not at all.
        arch: The network that the source is to hold, e.g. `ResNet-18-2x`, in
            whatever case; recognised from it by default.
        form: `training`, our names in training form, for `init_cfg` of type
            `Pretrained`; `deploy`, OpenMMLab's plain names (of a RepVGG
            deployed), or `torchvision`, its names. In the latter two every
            kernel is squeezed, in float64.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If the target exists already.
        CheckpointError: If the source is no such checkpoint, holds another
            network than `arch`, or has no such form.
        ImportError: If no package is installed that has the backbone.
        ValueError: If there is no such `form`.
    """
    if form not in CONVERTED_FORMS:
        raise ValueError(f'there is no form {form!r}, only {", ".join(CONVERTED_FORMS)}')
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f'{target} exists already: nothing is overwritten')
    checkpoint = load_checkpoint(source)
    expanded = 0
    try:
        plain = form == 'training' and plain_form_of(model_state_dict(checkpoint))
        if plain:
            architecture, state = read_plain_classifier(checkpoint)
        elif form == 'training':
            state = convert_official_state_dict(checkpoint)
            architecture = recognize_architecture(state)
        else:
            architecture, state = read_classifier(checkpoint)
        _require_architecture(architecture, arch)
        if form == 'torchvision' and architecture.backbone['type'] == 'OREPARepVGG':
            raise CheckpointError(f'it holds {architecture.name}, and torchvision has no RepVGG: '
                                  'convert it to the form deploy')
    except CheckpointError as error:
        raise CheckpointError(f'{source}: {error}') from error
    if plain:
        state, expanded = expanded_classifier(architecture, state)
    elif form != 'training':
        state = deployed_state_dict(architecture, state)
    if form == 'torchvision':
        state = {key.removeprefix('backbone.').removeprefix('head.'): value
                 for key, value in state.items()}
    meta = {'form': CONVERTED_FORMS[form], 'arch': architecture.name,
            'backbone': architecture.backbone, 'source': source.name,
            'orepa_mm_version': __version__}
    with written_whole(target) as path:
        torch.save({'meta': meta, 'state_dict': state}, path)
    return Conversion(architecture, form, len(state), expanded)


def deployed_state_dict(architecture: Architecture, state_dict: Mapping[str, Tensor]
                        ) -> dict[str, Tensor]:
    """Re-parameterize the weights of a classifier.

    Args:
        architecture: The network.
        state_dict: Its weights in our names, `backbone.*` and `head.fc.*`, in
            training form; left as they are.

    Returns:
        The weights of the stock network, `backbone.*` and `head.fc.*`.

    Raises:
        ImportError: If no package is installed that has the backbone.
    """
    prefix = 'backbone.'
    backbone = build_backbone(architecture)
    backbone.load_state_dict({key.removeprefix(prefix): value for key, value in state_dict.items()
                              if key.startswith(prefix)}, strict=True, assign=True)
    stock = reparameterize(backbone, inplace=True).state_dict()
    return {**{prefix + key: value for key, value in stock.items()},
            **{key: value for key, value in state_dict.items() if not key.startswith(prefix)}}


def expanded_classifier(architecture: Architecture, state_dict: Mapping[str, Tensor]
                        ) -> tuple[dict[str, Tensor], int]:
    """Put the kernels of a plain classifier into the blocks of its training form.

    Args:
        architecture: The network.
        state_dict: Weights of the stock network, `backbone.*` and `head.fc.*`;
            left as they are.

    Returns:
        The weights of the training form, `backbone.*` and `head.fc.*`, in
        float32 at least; and how many convolutions became blocks.

    Raises:
        CheckpointError: As of `load_plain_weights`.
        ImportError: If no package is installed that has the backbone.
    """
    prefix = 'backbone.'
    dtype = torch.promote_types(state_dict['head.fc.weight'].dtype, torch.float32)
    state = {key: value.to(dtype) if value.is_floating_point() else value
             for key, value in state_dict.items()}
    backbone = build_backbone(architecture, device='cpu').to(dtype)
    expanded = load_plain_weights(backbone, {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
        architecture.name)
    return ({**{prefix + key: value for key, value in backbone.state_dict().items()},
             **{key: value for key, value in state.items() if not key.startswith(prefix)}},
            expanded)


def load_plain_weights(model: nn.Module, plain: Mapping[str, Tensor], source: str) -> int:
    """Let a model in training form compute what its plain form computes.

    Every layer that generates its kernel is set to generate that of the
    convolution of the same name; everything else is copied. Only the branches
    beside the origin branch keep their initial values.

    Args:
        model: In training form.
        plain: All weights of the plain form.
        source: What to call them in the log and in errors.

    Returns:
        How many layers were expanded.

    Raises:
        CheckpointError: If something of the model has no counterpart in the plain
            form, or the other way round, or does not fit it; or a layer cannot
            generate its kernel. The model is as it was but for sizes that
            do not fit.
    """
    state = expanded_state_dict(model, plain, source)
    own = model.state_dict().keys()
    missing, unused = sorted(own - state.keys()), sorted(state.keys() - own)
    if missing or unused:
        raise CheckpointError(
            f'{source}: the training form cannot start from its plain form, '
            + ' and '.join([f'which has nothing for {shortened(missing)}'] * bool(missing)
                           + [f'has no place for {shortened(unused)}'] * bool(unused))
            + '. What can be expanded is a convolution that keeps its name: no block of several '
            'branches with a BN each (RepVGG, DBB)')
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f'{source} does not fit the training form. {error}') from error
    return len(list(reparam_layers(model)))


def _require_architecture(found: Architecture, name: str | None) -> None:
    if name is None or name.lower() == found.name.lower():
        return
    known = '' if name.lower() in map(str.lower, PUBLISHED) else (
        f'; the published networks are {", ".join(PUBLISHED)}')
    raise CheckpointError(f'it holds {found.name}, not {name}{known}')
