"""Write a re-parameterized model as a checkpoint and a config."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mmengine.registry
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import nn

from ..backbones.registration import resolved, scope_of
from ..datasets.config_walk import find_datasets
from ..errors import ConfigError
from ..files import written_whole
from ..openmmlab.expanded import build_expanded, stock_cfg_of_expanded
from ..reparam import is_training_form

#: Plain: the stock model. Folded: BN folded into the convolutions as well.
DEPLOYED_FORMS = ('plain', 'folded')
_PACKAGE = __name__.partition('.')[0]
#: Stands for the folder of the data in a text.
_MARK = '@DATA_ROOT@'
#: Settings that belong to a run; `reparam` holds what our configs picked from.
_TRAINING_ONLY = ('load_from', 'resume', 'work_dir', 'launcher', 'reparam')
#: Settings to train a teacher and a student, which one detector cannot be run with.
_OF_TEACHER_AND_STUDENT = ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler',
                           'auto_scale_lr', 'custom_hooks')


def deploy_config(cfg: Config, form: str = 'plain') -> Config:
    """The config of a re-parameterized model.

    Args:
        cfg: A config with OREPA backbones or OREPA conv layers; its scope's
            modules must be imported.
        form: `plain`, the stock model, whose config needs nothing of this
            package; `folded`, the stock model without BN, which this package
            builds (`BNFolded`).

    Returns:
        A new config: stock backbone types, `conv_cfg=None` in place of OREPA's,
        `deploy=True` for blocks of other packages that re-parameterize themselves
        (`switch_to_deploy`, which `reparameterize` calls), no pretrained weights,
        and of the plain form nothing that resolves to this package: no import,
        hook or optimizer constructor. Of a detector that holds others it is the
        config of the one that `used_detector` takes, without the settings to train two.

    Raises:
        ConfigError: If something of this package stands where no stock type
            can, or there is no such form.
    """
    if form not in DEPLOYED_FORMS:
        raise ConfigError(f'there is no form {form!r}, only {", ".join(DEPLOYED_FORMS)}')
    content = cfg.to_dict()
    for key in _TRAINING_ONLY:
        content.pop(key, None)
    model, registry = content.pop('model'), _model_registry()
    content = _without_ours(content, _registered_by_us())
    used = _used_detector_cfg(model, registry)
    if used is not model:
        content = {key: value for key, value in content.items()
                   if not key.startswith('teacher') and key != 'detector' and not (
                       'detector' in model and key in _OF_TEACHER_AND_STUDENT)}
        if 'detector' in model and content.get('val_cfg'):
            content['val_cfg'] = dict(type='ValLoop')
    try:
        content['model'] = _stock_model(used, registry)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    imports = content.get('custom_imports')
    if imports:
        names = imports['imports']
        kept = [name for name in ([names] if isinstance(names, str) else names)
                if name.partition('.')[0] != _PACKAGE]
        if kept:
            imports['imports'] = kept
        else:
            del content['custom_imports']
    if form == 'folded':
        content['model'] = {**content['model'], 'type': 'BNFolded',
                            'model_type': content['model']['type']}
        imports = content.setdefault('custom_imports', dict(imports=[]))
        imports['imports'] = [*imports['imports'], _PACKAGE]
        imports['allow_failed_imports'] = False
    return Config(content)


def used_detector(model: nn.Module) -> nn.Module:
    """What of a model is deployed: the one detector that predicts.

    Of MMDetection's semi-supervised detectors that is the teacher, or the student if
    `semi_test_cfg=dict(predict_on='student')` says so; of a student that learns from a
    teacher (LD, LAD) the student alone.

    Args:
        model: Any model; left as it is.

    Returns:
        A detector that shares its parts with the model, or the model itself.
    """
    if 'SemiBaseDetector' in _names_of_bases(type(model)):
        used = copy.copy(model.teacher if _predicts_on(model.semi_test_cfg) == 'teacher'
                         else model.student)
        own = model.data_preprocessor
        used._modules = {**used._modules,
                         'data_preprocessor': getattr(own, 'data_preprocessor', own)}
        used.dataset_meta = getattr(model, 'dataset_meta', None)
        return used
    if _DISTILLED in _names_of_bases(type(model)):
        used = copy.copy(model)
        for name in ('teacher_model', 'eval_teacher'):
            del used.__dict__[name]
        used.__class__ = _without_teacher(type(model))
        return used
    return model


def save_deployed(model: nn.Module, cfg: Config, folder: str | Path,
                  meta: Mapping[str, Any], safetensors: bool = False) -> list[Path]:
    """Write `model.pth` and `config.py`; the checkpoint holds tensors and plain types only.

    Args:
        model: In deploy form.
        cfg: From `deploy_config`.
        folder: Where to write; created if it is missing.
        meta: Plain types, stored under `meta`, beside the config as text (`cfg`),
            from which the inferencers of OpenMMLab build the model.
        safetensors: Write the weights as `model.safetensors` as well, the meta
            as JSON in its metadata, under `meta`.

    Returns:
        Paths of the checkpoint, of the config, and of what else was written.

    Raises:
        ValueError: If the model is in training form.
        ImportError: If safetensors is asked for and missing.
    """
    if is_training_form(model):
        raise ValueError('the model is in training form: re-parameterize it before saving')
    text = portable_text(cfg)
    folder, meta = Path(folder), {**meta, 'cfg': text}
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    with written_whole(folder / 'model.pth') as path:
        torch.save({'meta': meta, 'state_dict': state}, path)
    with written_whole(folder / 'config.py') as path:
        path.write_text(text, encoding='utf-8')
    written = [folder / 'model.pth', folder / 'config.py']
    if safetensors:
        save_file = require_safetensors()
        # the format knows no tensors that share memory
        with written_whole(folder / 'model.safetensors') as path:
            save_file({key: value.contiguous().clone() for key, value in state.items()},
                      str(path), {'format': 'pt', 'meta': json.dumps(meta)})
        written.append(folder / 'model.safetensors')
    return written


def portable_text(cfg: Config) -> str:
    """A config as a file whose first line alone says where the data are.

    Configs that are dumped name the folder at every data set and metric. A
    deployed model moves to another machine, whose data lie elsewhere: there, one
    line is to be changed.

    Args:
        cfg: A config; the folder is its `data_root`, or else the one that all of
            its data sets name.

    Returns:
        Python code. It is the config's own text if there is no such folder.
    """
    content = cfg.to_dict()
    root = content.pop('data_root', None)
    if not root:
        roots = {dataset.get('data_root') for dataset in find_datasets(cfg)}
        root = roots.pop() if len(roots) == 1 else None
    if not isinstance(root, str) or not root:
        return cfg.pretty_text
    text = Config(_with_mark(content, root)).pretty_text
    if _MARK not in text:
        return cfg.pretty_text
    text = re.sub(f"(['\"]){_MARK}\\1", 'data_root', text)
    text = re.sub(f"(['\"]){_MARK}", r'data_root + \1', text)
    return f'data_root = {root!r}  # on another machine this line alone changes\n' + text


def _with_mark(value: Any, root: str) -> Any:
    """Settings in which a mark stands for a folder at the beginning of paths."""
    if isinstance(value, dict):
        return {key: _with_mark(item, root) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_mark(item, root) for item in value)
    if isinstance(value, str) and (value == root or (
            value.startswith(root) and (root.endswith('/') or value[len(root)] == '/'))):
        return _MARK + value[len(root):]
    return value


def require_safetensors() -> Callable[..., None]:
    """The function of safetensors that writes a file.

    Raises:
        ImportError: If safetensors is not installed; it says what to do.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError('to write safetensors, install it: pip install safetensors') from error
    return save_file


#: MMDetection's students that learn from a teacher, and predict without it.
_DISTILLED = 'KnowledgeDistillationSingleStageDetector'


def _used_detector_cfg(model: Any, registry: Registry) -> Any:
    """The config of what `used_detector` takes."""
    found = _found(model, registry)
    names = _names_of_bases(found) if inspect.isclass(found) else ()
    if 'SemiBaseDetector' in names:
        own = (model.get('data_preprocessor') or {}).get('data_preprocessor')
        return {**model['detector'], **({'data_preprocessor': own} if own else {})}
    if _DISTILLED in names:
        scope = ''.join(model['type'].rpartition('.')[:2]) if isinstance(model['type'], str) else ''
        return {**{key: value for key, value in model.items()
                   if not key.startswith('teacher_') and key != 'eval_teacher'},
                'type': scope + _without_teacher(found).__name__}
    return model


def _names_of_bases(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__]


def _without_teacher(kind: type) -> type:
    """What a student that learns from a teacher is derived from."""
    return kind.__mro__[_names_of_bases(kind).index(_DISTILLED) + 1]


def _predicts_on(semi_test_cfg: Mapping[str, Any] | None) -> str:
    return (semi_test_cfg or {}).get('predict_on', 'teacher')


def _model_registry() -> Registry:
    """The model registry of the current scope, e.g. mmdet's."""
    scope = DefaultScope.get_current_instance()
    with MODELS.switch_scope_and_registry(scope.scope_name if scope else None) as registry:
        return registry


def _registered_by_us() -> dict[str, Any]:
    """What this package registered in MMEngine's root registries beside models, by name."""
    registries = [registry for registry in vars(mmengine.registry).values()
                  if isinstance(registry, Registry) and registry is not MODELS]
    return {name: found for registry in registries
            for name, found in registry.module_dict.items() if _is_ours(found)}


def _without_ours(value: Any, ours: Mapping[str, Any]) -> Any:
    """Settings without what resolves to this package, or with its stock counterpart there.

    A class of ours names that counterpart as `stock_type`, and options that it
    alone knows as `own_options`.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_without_ours(item, ours) for item in value
                           if _stays(item, ours))
    if not isinstance(value, dict):
        return value
    result = {key: _without_ours(item, ours) for key, item in value.items()
              if _stays(item, ours) and not (key == 'constructor' and _named(item, ours))}
    found = _named(value.get('type'), ours) or _named(value.get('constructor'), ours)
    for option in getattr(found, 'own_options', ()):
        result.pop(option, None)
        (result.get('paramwise_cfg') or {}).pop(option, None)
    if hasattr(found, 'stock_type'):
        result['type'] = found.stock_type
    return result


def _stays(value: Any, ours: Mapping[str, Any]) -> bool:
    found = _named(value.get('type'), ours) if isinstance(value, dict) else None
    return found is None or hasattr(found, 'stock_type')


def _named(name: Any, ours: Mapping[str, Any]) -> Any:
    """What of ours goes by this name, or is it, in a config; else None.

    A name may have a scope, or be the whole path of a class, as configs of the
    lazy kind are dumped.
    """
    if isinstance(name, str):
        scope, _, last = name.rpartition('.')
        return ours.get(last) if '.' not in scope or scope.startswith(f'{_PACKAGE}.') else None
    return name if name is not None and _is_ours(name) else None


def _stock_model(value: Any, registry: Registry) -> Any:
    """A model config with everything of this package replaced by what is stock."""
    if isinstance(value, (list, tuple)):
        return type(value)(_stock_model(item, registry) for item in value)
    if not isinstance(value, dict):
        return value
    ours = _our_type(value, registry)
    if ours is build_expanded:
        return _stock_model(stock_cfg_of_expanded(value), registry)
    # None and not left out: some stock modules have another conv layer by default
    result = {key: None if key == 'conv_cfg' and _our_type(item, registry)
              else _stock_model(item, registry) for key, item in value.items()}
    if 'init_cfg' in result:
        result['init_cfg'] = _without_pretrained(result['init_cfg'])
    if isinstance(result.get('pretrained'), str):  # the older name of the same
        result['pretrained'] = None
    if ours is not None:
        if not hasattr(ours, 'stock_cfg'):
            raise ValueError(f'{value} has no stock counterpart that a config could name')
        result = ours.stock_cfg(result)
        scope = scope_of(ours)
        if '.' not in result['type'] and registry.scope != scope:
            result['type'] = f'{scope}.{result["type"]}'
    elif _has_deploy_form(value, registry):
        result['deploy'] = True
    return result


def _without_pretrained(init_cfg: Any) -> Any:
    """Rules of initialisation without weights to start from, maybe of the training form."""
    if isinstance(init_cfg, (list, tuple)):
        return [rule for rule in map(_without_pretrained, init_cfg) if rule is not None] or None
    is_pretrained = isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained'
    return None if is_pretrained else init_cfg


def _found(value: Any, registry: Registry) -> Any:
    """What a config's `type` names, in its own `_scope_` if it has one."""
    name = value.get('type') if isinstance(value, dict) else None
    if not isinstance(name, str):
        return name
    if value.get('_scope_') in (None, registry.scope):
        return registry.get(name)
    with registry.switch_scope_and_registry(value['_scope_']) as other:  # as MMEngine builds it
        return other.get(name)


def _has_deploy_form(value: dict, registry: Registry) -> bool:
    """Whether a config's `type` re-parameterizes itself, and can be built in that form."""
    found = _found(value, registry)
    return (inspect.isclass(found) and hasattr(found, 'switch_to_deploy')
            and 'deploy' in inspect.signature(found).parameters)


def _our_type(value: Any, registry: Registry) -> Any:
    """What a config's `type` names, if it is defined in this package; else None."""
    found = _found(value, registry)
    return resolved(found) if _is_ours(found) else None


def _is_ours(found: Any) -> bool:
    return getattr(found, '__module__', '').partition('.')[0] == _PACKAGE
