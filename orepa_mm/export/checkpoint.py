"""From an ImageNet checkpoint in training form to what other models load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import (
    PUBLISHED,
    Architecture,
    convert_official_state_dict,
    load_checkpoint,
    read_classifier,
    recognize_architecture,
)
from ..checkpoints.architectures import build_backbone
from ..errors import CheckpointError
from ..files import written_whole
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
    """

    architecture: Architecture
    form: str
    num_tensors: int


def convert_checkpoint_file(source: str | Path, target: str | Path, arch: str | None = None,
                            form: str = 'training') -> Conversion:
    """Convert a classifier's checkpoint file to another form.

    The file written holds `state_dict` and, under `meta`, its form, the
    network and the name of the source.

    Args:
        source: A file of the authors, or one that the runner saved of a
            classifier with one of our backbones; in training form.
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
    try:
        if form == 'training':
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
    if form != 'training':
        state = deployed_state_dict(architecture, state)
    if form == 'torchvision':
        state = {key.removeprefix('backbone.').removeprefix('head.'): value
                 for key, value in state.items()}
    meta = {'form': CONVERTED_FORMS[form], 'arch': architecture.name,
            'backbone': architecture.backbone, 'source': source.name,
            'orepa_mm_version': __version__}
    with written_whole(target) as path:
        torch.save({'meta': meta, 'state_dict': state}, path)
    return Conversion(architecture, form, len(state))


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


def _require_architecture(found: Architecture, name: str | None) -> None:
    if name is None or name.lower() == found.name.lower():
        return
    known = '' if name.lower() in map(str.lower, PUBLISHED) else (
        f'; the published networks are {", ".join(PUBLISHED)}')
    raise CheckpointError(f'it holds {found.name}, not {name}{known}')
