"""Settings that nothing reads: a mistyped key must not be taken in silence."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, FlexibleRunner, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..errors import ConfigError, shortened


def _arguments(*functions: Any) -> set[str]:
    """Names of the arguments of functions and classes."""
    return {name for function in functions
            for name in inspect.signature(function).parameters} - {'self'}


#: What MMEngine and the tools of OpenMMLab read of a config. What else it holds are variables, from
#: which these were made when the file was read.
_TOP = _arguments(Runner, FlexibleRunner) - {'cfg'} | {
    'activation_checkpointing', 'compile', 'custom_imports', 'detect_anomalous_params',
    'efficient_conv_bn_eval', 'find_unused_parameters', 'model_wrapper_cfg', 'runner_type',
    'sync_bn', 'tta_model', 'tta_pipeline'}
_DATALOADER = _arguments(DataLoader) | {'num_batch_per_epoch'}
_LOOPS = ('EpochBasedTrainLoop', 'IterBasedTrainLoop')
#: What may stand in dictionaries that are no arguments of a `type`, and are not passed on.
_INSIDE = {
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'randomness': _arguments(Runner.set_randomness),
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'train_cfg': _arguments(EpochBasedTrainLoop, IterBasedTrainLoop) | {'by_epoch', 'type'},
    **dict.fromkeys(('train_dataloader', 'val_dataloader', 'test_dataloader'), _DATALOADER),
}


def require_known_keys(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse settings that nothing would read, as of a mistyped name.

    The first name must be one that MMEngine or a tool of OpenMMLab reads. A
    variable of the config file, such as `max_epochs`, was read when that was read:
    to change it afterwards changes nothing. The second is looked at only inside
    dictionaries without a `type` whose names MMEngine fixes, such as `env_cfg` and
    `train_dataloader`, and of its own training loops; a new name of `default_hooks`
    needs a `type`. Everything deeper, and everything inside another dictionary with
    a `type`, is left to what it is passed to: `model.backbone.frozen_stages=1` may
    be new, and so may `model.test_cfg.anything`. A runner of one's own
    (`runner_type`) may read any name that the config has.

    Args:
        cfg: The config, before the options are merged into it.
        options: Values by their names with dots, as of `--cfg-options`.

    Raises:
        ConfigError: It names the key that is read instead, or the nearest known name.
    """
    for key in options:
        first, *others = key.split('.')
        _require(key, first, '', _TOP | set(cfg), 'the config has no {}, and nothing would read it')
        parent = cfg.get(first)
        if 'runner_type' not in cfg and first not in _read(cfg):
            raise ConfigError(_of_a_variable(cfg, key))
        if not others or 'runner_type' in cfg or (parent is not None and not (
                isinstance(parent, dict) and parent.get('type') in (None, *_LOOPS))):
            continue
        if first in _INSIDE:
            _require(key, others[0], f'{first}.', _INSIDE[first] | set(parent or ()) | {'_delete_'},
                     f'{first} has no {{}}, and nothing would read it')
        elif first == 'default_hooks' and len(others) > 1 and (
                f'{first}.{others[0]}.type' not in options):
            _require(key, others[0], f'{first}.', set(parent or ()),
                     f'{first} has no {{}}; a new one needs {first}.{others[0]}.type as well')


def _read(cfg: Config) -> set[str]:
    """The first names that a run with this config reads."""
    # the runner takes this one where the model has none
    own = 'data_preprocessor' in (cfg.get('model') or ())
    return _TOP - {'data_preprocessor'} if own else _TOP


def _of_a_variable(cfg: Config, key: str) -> str:
    """What to set instead of a variable: where its value is, under a like name if there is one."""
    name, dot, rest = key.partition('.')
    value = _without_scope(cfg.get(name, cfg.get('model', {}).get(name)))
    equal = [where for top in sorted(_read(cfg) & set(cfg))
             for where, found in _settings(cfg[top], top) if found == value]
    like = [where for where in equal
            if (last := where.rpartition('.')[2]) == name or last in name or name in last]
    telling = like or (equal if value and isinstance(value, (str, dict, list)) else [])
    instead = (shortened([where + dot + rest for where in telling]) if telling
               else 'what was made from it')
    return (f'--cfg-options {key}: nothing reads {name} of the config once its file is read. Set '
            + '--data-root, or ' * (name == 'data_root') + f'{instead}. If your own code reads it, '
            'write it into a config file, with the one that you gave as its _base_.')


def _settings(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value inside a part of a config, by its name with dots, the part itself first."""
    yield where, _without_scope(value)
    for key, item in (value.items() if isinstance(value, dict) else
                      enumerate(value) if isinstance(value, (list, tuple)) else ()):
        yield from _settings(item, f'{where}.{key}')


def _without_scope(value: Any) -> Any:
    """The value, without the scope that MMEngine notes in what comes from other packages."""
    if isinstance(value, dict):
        return {key: _without_scope(item) for key, item in value.items() if key != '_scope_'}
    return [*map(_without_scope, value)] if isinstance(value, (list, tuple)) else value


def _require(key: str, name: str, above: str, known: Collection[str], problem: str) -> None:
    """Refuse a name that is not among the known ones."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        f'--cfg-options {key}: {problem.format(name)}. '
        + (f'Is {above}{near[0]} meant?' if near else
           'If your own code reads it, write it into a config file, with the one that you gave '
           'as its _base_.' if not above else f'There are {", ".join(sorted(known))}.'))
