"""Variants of a training config: the same run with other blocks, or none."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import MODELS

from ..checkpoints import load_checkpoint, load_pretrained, model_state_dict
from ..checkpoints.forms import is_branch_key
from ..engine import without_reparam_test
from ..errors import CheckpointError, ConfigError
from ..export.stock import deploy_config
from ..layers import build_orepa_conv

#: What a variant can be called, and what that is.
VARIANTS = {
    'plain': 'the stock network, trained alike',
    'dbb': 'Diverse Branch Blocks in place of OREPA blocks',
    'orepa': 'the config as it is',
    'expand': 'the config, started from the weights of a plain network (--plain-checkpoint)',
}
#: The learning rate, as `lr=` for short.
_LEARNING_RATE = 'optim_wrapper.optimizer.lr'


@dataclass(frozen=True)
class Variant:
    """A variant, as it is written on the command line.

    Attributes:
        text: `KIND`, or `KIND:OPTION,OPTION=VALUE,...`.
        kind: One of `VARIANTS`.
        block_options: For every OREPA layer: what `conv_cfg` takes, e.g. `single_init`.
        settings: For the config: names with dots, or keys that it has, e.g. `load_from`.
    """

    text: str
    kind: str
    block_options: dict[str, Any] = field(default_factory=dict, compare=False)
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a variant.

        An option is `lr` (of the optimizer), a setting of the config (a name with
        dots, or `load_from`), or else an option of the blocks. One of the blocks
        without a value is True.

        Args:
            text: E.g. `plain`, `orepa:single_init,lr=5e-4`.

        Raises:
            ConfigError: If there is no such kind, an option has no name, a
                setting no value or one that cannot be read, or a plain or DBB
                network is given options of OREPA blocks.
        """
        kind, _, options = text.partition(':')
        if kind not in VARIANTS:
            raise ConfigError(f'there is no variant {kind!r}, choose among {", ".join(VARIANTS)}')
        block_options, settings = {}, {}
        for option in _split(options) if options else []:
            name, equals, value = option.partition('=')
            key = _LEARNING_RATE if name == 'lr' else name
            is_setting = '.' in key or key == 'load_from'
            if not key.strip() or ((is_setting or equals) and not value.strip()):
                raise ConfigError(f'the variant {text!r} has an option without a '
                                  + (f'value: {name}' if key.strip() else 'name'))
            (settings if is_setting else block_options)[key] = (
                _value(value, text) if equals else True)
        if block_options and kind in ('plain', 'dbb'):
            raise ConfigError(f'the variant {text!r} has no OREPA blocks that could take '
                              f'{", ".join(block_options)}')
        return cls(text, kind, block_options, settings)

    @property
    def slug(self) -> str:
        """A name for its folder."""
        return re.sub(r'[^\w.=-]+', '_', self.text)


def variant_config(cfg: Config, variant: Variant, plain_checkpoint: str | Path | None = None
                   ) -> Config:
    """The config of a variant: everything but the blocks stays.

    Args:
        cfg: A training config with OREPA, from `orepa_mm.engine.load_config`.
        variant: What to make of it.
        plain_checkpoint: Weights that `plain` and `expand` start from: of a
            backbone (a classifier), or of the whole model.

    Returns:
        A new config.

    Raises:
        CheckpointError: If the plain checkpoint is in training form, or its
            backbone is another than the config's.
        ConfigError: If nothing of the config's model is OREPA's, there is no such
            variant of it, the blocks or the config have no such option, or
            `expand` has no checkpoint.
    """
    stock = _as_trained(deploy_config(cfg).model, cfg.model)
    if stock == cfg.model:
        raise ConfigError('the config has nothing of OREPA in its model: give the config that an '
                          'OREPA network is trained with')
    if variant.kind in ('orepa', 'expand') and with_block_options(
            cfg.model, {'probe': True}) == cfg.model:
        raise ConfigError(f'there is no variant {variant.kind}: the model of the config has no '
                          'OREPA layers')
    _require_known(cfg, variant)
    result = copy.deepcopy(cfg)
    if variant.kind == 'plain':
        result = without_reparam_test(result)
        result.model = stock
    elif variant.kind == 'dbb':
        result.model = _replaced(cfg.model, _to_dbb)
    elif variant.block_options:
        result.model = with_block_options(cfg.model, variant.block_options)
    if variant.kind == 'expand' and plain_checkpoint is None:
        raise ConfigError('the variant expand starts from a plain network: give its checkpoint '
                          'with --plain-checkpoint')
    if variant.kind in ('plain', 'expand') and plain_checkpoint is not None:
        _start_from(result, Path(plain_checkpoint))
    result.merge_from_dict(variant.settings)
    return result


def with_block_options(model: Any, options: Mapping[str, Any]) -> Any:
    """A model config with options for every OREPA layer in it.

    Args:
        model: A model config, or a part of one; left as it is.
        options: What `conv_cfg=dict(type='OREPA')` takes beside the type.
    """
    def with_options(value: dict) -> dict:
        kind = _last_name(value)
        if kind == 'OREPA':
            return {**value, **options}
        if kind.startswith('OREPA'):  # a backbone, which has the layer type by default
            return {**value, 'conv_cfg': {**(value.get('conv_cfg') or {}), **options}}
        if kind == 'Expanded':
            expand = dict(value.get('expand') or {})
            conv_cfg = {'type': 'OREPA', **(expand.get('conv_cfg') or {}), **options}
            return {**value, 'expand': {**expand, 'conv_cfg': conv_cfg}}
        return value

    return _replaced(model, with_options)


def _replaced(value: Any, change: Callable[[dict], dict]) -> Any:
    """A config with every dict in it replaced, the inner ones first."""
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, change) for item in value)
    if not isinstance(value, dict):
        return value
    return change({key: _replaced(item, change) for key, item in value.items()})


def _to_dbb(value: dict) -> dict:
    """DBB in place of OREPA in one part of a model config."""
    kind = _last_name(value)
    if kind == 'OREPA':
        return {'type': 'DBB'}
    if kind == 'Expanded':
        raise ConfigError('there is no variant dbb of a model of type Expanded: a Diverse Branch '
                          'Block cannot start from a given kernel')
    if kind.startswith('OREPA'):
        name = value['type']
        if not isinstance(name, str):  # a class, in a config of the lazy kind
            name = f'{name.__module__}.{name.__name__}'
        name = name.replace('OREPA', 'DBB')
        if MODELS.get(name) is None:
            raise ConfigError(f'there is no variant dbb: {kind} has no counterpart with Diverse '
                              'Branch Blocks')
        # its conv_cfg holds options of OREPA layers
        return {**{key: item for key, item in value.items() if key != 'conv_cfg'}, 'type': name}
    return value


def _last_name(value: dict) -> str:
    kind = value.get('type')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _as_trained(stock: Any, original: Any) -> Any:
    """A stock model config that starts as the original does, and is not deployed if that is not."""
    if isinstance(stock, (list, tuple)):
        return type(stock)(map(_as_trained, stock, original))
    if not isinstance(stock, dict):
        return stock
    result = {key: _as_trained(item, original[key]) if key in original else item
              for key, item in stock.items()}
    for key in ('init_cfg', 'pretrained', 'deploy'):
        result.pop(key, None)
        if key in original:
            result[key] = copy.deepcopy(original[key])
    return result


def _start_from(cfg: Config, checkpoint: Path) -> None:
    """Let a config start from a checkpoint: the whole model, or its backbone from a classifier."""
    state = model_state_dict(load_checkpoint(checkpoint))
    if any(map(is_branch_key, state)):
        raise CheckpointError(f'{checkpoint} is in training form, and --plain-checkpoint takes a '
                              'plain network')
    parts = {key.partition('.')[0] for key in state}
    prefix = dict(prefix='backbone.') if 'backbone' in parts else {}
    # MMEngine would only warn of weights that do not fit, and a plain network start at random
    load_pretrained(MODELS.build({**cfg.model.backbone, 'init_cfg': None}), str(checkpoint),
                    **prefix)
    whole = cfg.get('default_scope') == 'mmpretrain' or parts - {'backbone', 'head'}
    if prefix and whole:
        cfg.load_from = str(checkpoint.resolve())
    else:
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint.resolve()),
                                           **prefix)


def _split(options: str) -> list[str]:
    """Options at the commas that stand in no brackets."""
    parts, depth = [''], 0
    for letter in options:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts


def _value(text: str, variant: str) -> Any:
    """A value as MMEngine reads those of `--cfg-options`; blanks in a path stay."""
    if not text.startswith(('(', '[')):
        return DictAction._parse_int_float_bool(text)
    try:
        return DictAction._parse_iterable(text)
    except (AssertionError, RecursionError) as error:
        raise ConfigError(f'the variant {variant!r} has a value that cannot be read: {text}'
                          ) from error


def _require_known(cfg: Config, variant: Variant) -> None:
    """Refuse options that no run could have, before any of them has run for hours."""
    for key in variant.settings:
        if key != 'load_from' and key.partition('.')[0] not in cfg:
            raise ConfigError(f'the variant {variant.text!r} sets {key}, and the config has no '
                              f'{key.partition(".")[0]}')
    try:
        build_orepa_conv(8, 8, 3, padding=1, **variant.block_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'the variant {variant.text!r} has options that OREPA blocks do not '
                          f'take: {error}') from error
