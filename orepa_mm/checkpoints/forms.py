"""What the keys of a checkpoint say about its form."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ..errors import CheckpointError

_Value = TypeVar('_Value')

#: A branch of an OREPA block: only a training form has them. (`vector` is a name of others too.)
_BRANCH = re.compile(r'\.weight_(orepa|or1x1|rbr|online)_\w+$')
_DBB = re.compile(r'\.dbb_(origin|avg|1x1|1x1_kxk)\.')
#: What is left of a BN that was folded.
FOLDED = 'folded_norm'
#: The one convolution of a block that the authors' code re-parameterized.
_DEPLOYED_BY_AUTHORS = re.compile(r'\.(orepa|or1x1|or_large|rbr|dbb)_reparam\.')
_DETECTOR_PARTS = frozenset({'neck', 'bbox_head', 'rpn_head', 'roi_head', 'mask_head'})
_SEGMENTOR_PARTS = frozenset({'decode_head', 'auxiliary_head'})


def is_branch_key(key: str) -> bool:
    """Whether only a training form has this key: that of a branch.

    Args:
        key: Of a state dict.
    """
    return bool(_BRANCH.search(key) or _DBB.search(key))


def is_in_authors_names(keys: Collection[str]) -> bool:
    """Whether these are keys of a network in training form as the authors' code names them.

    Args:
        keys: Of a state dict, without the prefix `module.`.
    """
    return any(map(_BRANCH.search, keys)) and any(re.match(r'stage\d\.', key) for key in keys)


def is_folded(keys: Collection[str]) -> bool:
    """Whether these are keys of weights into which a BN was folded.

    Args:
        keys: Of a state dict.
    """
    return any(key.rpartition('.')[2] == FOLDED for key in keys)


def without_mark(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights without the key that `read_file` gave to a folded form of version 0.2.0.

    Args:
        state_dict: The weights; left as they are.
    """
    if FOLDED not in state_dict:
        return state_dict
    return with_module_notes({key: value for key, value in state_dict.items() if key != FOLDED},
                             module_notes(state_dict))


def module_notes(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """PyTorch's own notes beside weights: the version of each module, by the module's name.

    Args:
        state_dict: Of a model or of a part of it.

    Returns:
        The notes; empty for a state dict that PyTorch did not make.
    """
    return getattr(state_dict, '_metadata', None) or {}


def with_module_notes(state_dict: Mapping[str, _Value], notes: Mapping[str, dict[str, Any]]
                      ) -> OrderedDict[str, _Value]:
    """The same weights with other notes.

    Args:
        state_dict: The weights; left as they are.
        notes: As of `module_notes`; copied.
    """
    result = OrderedDict(state_dict)
    result._metadata = OrderedDict(notes)  # type: ignore[attr-defined]  # as PyTorch does
    return result


def training_form_of(keys: Collection[str]) -> str:
    """Tell the authors' training form of a classifier from ours, and both from all else.

    Args:
        keys: Of a state dict, without the prefix `module.`.

    Returns:
        `authors` for their names (`stage1.0.conv1...`, `linear.*`), `ours` for
        OpenMMLab's (`backbone.*`, `head.fc.*`).

    Raises:
        CheckpointError: If it is neither; the message says what it is instead.
    """
    parts = {key.partition('.')[0] for key in keys}
    begins = f'it begins with the keys {", ".join(list(keys)[:3])}'
    deployed = next((key for key in keys if _DEPLOYED_BY_AUTHORS.search(key)), None)
    if deployed:
        raise CheckpointError(
            f"this network was deployed by the authors' code already (it has {deployed}): its "
            'branches are gone. Convert the checkpoint in training form that it was made from')
    if any(map(_DBB.search, keys)):
        raise CheckpointError(
            'this network has Diverse Branch Blocks, not OREPA. If it was trained with a config '
            'of this package, re-parameterize it with that config: tools/reparam.py CONFIG '
            'CHECKPOINT')
    if any(map(_BRANCH.search, keys)):
        if 'backbone' in parts:
            if 'head' not in parts:
                _refuse_other_tasks(parts)
            return 'ours'
        if is_in_authors_names(keys):
            return 'authors'
        raise CheckpointError(
            'this has OREPA blocks in training form, but is no image classifier: neither with '
            f"backbone.* and head.fc.*, nor in the authors' names; {begins}")
    if 'backbone' in parts:
        raise CheckpointError(
            "this has OpenMMLab's plain names and no OREPA block: it is in deploy form already, "
            "or a stock model's. It loads into the stock model as it is")
    if 'conv1.weight' in keys and any(key.startswith('layer1.') for key in keys):
        kind = 'of torchvision' if 'fc' in parts else 'of a backbone alone'
        raise CheckpointError(
            f'this is a plain ResNet in the names {kind}: it has no OREPA block. It was deployed '
            'already, or never trained with OREPA')
    raise CheckpointError("this is no OREPA network of the authors, and none of this package's: "
                          f'it has no OREPA block and {begins}')


def _refuse_other_tasks(parts: set[str]) -> None:
    """Refuse a detector or segmentor in training form; `parts` begin its keys."""
    for kind, known in (('a segmentor', _SEGMENTOR_PARTS), ('a detector', _DETECTOR_PARTS)):
        if parts & known:
            raise CheckpointError(
                f'this is {kind} in training form ({", ".join(sorted(parts))}), where an image '
                'classifier is expected. Re-parameterize it with its config: tools/reparam.py '
                'CONFIG CHECKPOINT')
