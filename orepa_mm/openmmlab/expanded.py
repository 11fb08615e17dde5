"""Stock models from their own configs: in training form, or with their BN folded."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from ..errors import ConfigError
from ..layers import ReparamConv2d, reparam_layers
from ..reparam import expand as expand_model
from ..reparam import fold_batch_norm
from ..reparam.copies import replaced

#: Options of `expand` that a config may give.
_OPTIONS = ('conv_cfg', 'include', 'exclude')


@MODELS.register_module(name='Expanded')
def build_expanded(model_type: str, expand: Mapping[str, Any] | None = None, **cfg: Any
                   ) -> nn.Module:
    """Build a stock model and expand it, whether its parts know of `conv_cfg` or not.

    A child of any stock config of mmdet, mmseg or mmpretrain needs two lines
    beside its `custom_imports`; a part of a model (`backbone`, `neck`) is built
    so as well. What is returned is the stock class, so whatever reads the model
    finds it. `deploy_config` writes the stock config again.

    The model starts where the stock one starts: its first `init_weights()`
    runs on plain convolutions, and what they hold then is what the blocks
    generate. So rules, loops over `nn.Conv2d` and plain pretrained weights act
    as they do in the stock model. Weights in training form are for `load_from`;
    in an `init_cfg` they are an error, since they meet plain convolutions there.

    Args:
        model_type: The stock model, e.g. `RTMDet`.
        expand: Options of `orepa_mm.expand`: `conv_cfg`, `include`, `exclude`.
            All convolutions that have an OREPA block, by default.
        **cfg: The stock model's config.

    Returns:
        The stock model in training form.

    Raises:
        ConfigError: If there is another option in `expand`.
        NothingToConvertError: If no convolution is expanded.

    Example:
        >>> _base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
        >>> custom_imports = dict(imports=['orepa_mm'], allow_failed_imports=False)
        >>> model = dict(type='Expanded', model_type='RTMDet')
    """
    options = dict(expand or {})
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ConfigError(f'expand of a {model_type} has no option {", ".join(unknown)}: there are '
                          f'{", ".join(_OPTIONS)}')
    model = MODELS.build({'type': model_type, **cfg})
    before = set(reparam_layers(model))
    model = expand_model(model, **options, inplace=True)
    blocks = set(reparam_layers(model)) - before
    if hasattr(model, 'init_weights') and model not in blocks:
        # on the instance, since its class stays the stock one; copies get a partial of their own
        model.init_weights = functools.partial(  # type: ignore[assignment]
            _init_in_plain_form, model,
            [name for name, module in model.named_modules() if module in blocks])
    return model


@MODELS.register_module(name='BNFolded')
def build_bn_folded(model_type: str, **cfg: Any) -> nn.Module:
    """Build a stock model whose BN is folded, for the weights that were saved of one.

    No stock config can say that a convolution before a BN has a bias and the
    BN is gone. This builds the stock model, folds, and returns it: whatever
    reads the config or the model finds the stock one.

    Args:
        model_type: The stock model, e.g. `FasterRCNN`.
        **cfg: Its config.

    Returns:
        The stock model, `FoldedNorm` in place of each folded BN.

    Example:
        >>> model = dict(type='BNFolded', model_type='FasterRCNN', backbone=...)
    """
    model = MODELS.build({'type': model_type, **cfg})
    fold_batch_norm(model)
    return model


def stock_cfg_of_expanded(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model that is expanded.

    Args:
        cfg: A config of type `Expanded`.
    """
    stock = {key: value for key, value in cfg.items() if key not in ('model_type', 'expand')}
    return {**stock, 'type': cfg['model_type']}


def _init_in_plain_form(model: Any, names: Sequence[str]) -> None:
    """Initialise a model as its stock class does, with plain convolutions in place of blocks.

    The blocks and their parameters stay the same objects: an optimizer may
    hold them already.
    """
    del model.init_weights  # from here on it is that of the class
    blocks = [block for block in map(model.get_submodule, names)
              if isinstance(block, ReparamConv2d)]  # else it was re-parameterized
    convs = [block.to_conv2d() for block in blocks]
    replaced(model, dict(zip(blocks, convs)))
    _note_parameters(model, convs)
    try:
        model.init_weights()
    finally:
        replaced(model, dict(zip(convs, blocks)))
    for block, conv in zip(blocks, convs):
        block.set_kernel(conv.weight, conv.bias)


def _note_parameters(model: nn.Module, convs: Iterable[nn.Conv2d]) -> None:
    """Let MMEngine know of parameters that were not there when a larger model began to start."""
    known = getattr(model, '_params_init_info', None)
    if known is None:
        return
    for conv in convs:
        conv._params_init_info = known
        for parameter in conv.parameters():
            known[parameter] = {'init_info': '', 'tmp_mean_value': parameter.data.mean().cpu()}
