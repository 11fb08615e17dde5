"""The optimizer constructor: few parameter groups, and the stem's learning rate."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.optim import Optimizer

from ..errors import CheckpointError, shortened
from ..layers import OREPAStemConv2d


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OREPAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with few groups and a learning rate for the OREPA stem.

    As soon as there is any option, the default constructor makes one group of
    each parameter. An optimizer works group by group, so each step would
    launch a few operations per parameter. Here parameters with equal settings
    are one group, for which it has operations on many tensors at once.

    The authors advise to adjust the learning rate of the linear deep stem when
    ImageNet weights are transferred: its weights are distributed unlike a plain
    stem's. All other options are those of the default constructor. The scaling
    vectors are decayed like weights, as the authors do.

    Args:
        optim_wrapper_cfg: As of the default constructor.
        paramwise_cfg: As of the default constructor, and `stem_lr_mult`: factor
            on the learning rate of every `OREPAStemConv2d`, beside factors of
            `custom_keys`. 1 by default. `merge_groups`: False leaves one group
            per parameter, to go on with a run that had them. True by default.

    Raises:
        ValueError: If `stem_lr_mult` is negative or no number, or the optimizer
            has no `lr` that it could be applied to; if `merge_groups` is neither
            True nor False; when called, if modules share a parameter and
            `bypass_duplicate` is not set. The optimizer raises a
            `CheckpointError` if a state to load has other groups.

    Example:
        >>> optim_wrapper = dict(constructor='OREPAOptimWrapperConstructor',
        ...                      paramwise_cfg=dict(stem_lr_mult=0.1))
    """

    #: Options that a stock constructor does not know.
    own_options = ('stem_lr_mult', 'merge_groups')

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.stem_lr_mult = paramwise_cfg.pop('stem_lr_mult', 1.0)
        if not isinstance(self.stem_lr_mult, (int, float)) or self.stem_lr_mult < 0:
            raise ValueError('paramwise_cfg.stem_lr_mult must be a number that is not negative, '
                             f'got {self.stem_lr_mult!r}')
        self.merge_groups = paramwise_cfg.pop('merge_groups', True)
        if not isinstance(self.merge_groups, bool):
            raise ValueError('paramwise_cfg.merge_groups must be True or False, '
                             f'got {self.merge_groups!r}')
        if self.stem_lr_mult != 1:
            # The default constructor looks at single parameters only if there is any option.
            paramwise_cfg.setdefault('custom_keys', {})
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.stem_lr_mult != 1 and self.base_lr is None:
            raise ValueError('paramwise_cfg.stem_lr_mult needs an lr in the optimizer')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module: bool | None = None) -> None:
        """Collect the parameters of a module; see the default constructor."""
        start = len(params)
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        own = params[start:]
        if isinstance(module, OREPAStemConv2d) and self.stem_lr_mult != 1 and own:
            for group in own:
                group['lr'] = group.get('lr', self.base_lr) * self.stem_lr_mult
            print_log(f'learning rate of the stem {prefix}: times {self.stem_lr_mult}', 'current')
        if not prefix:  # this is the model, all its parameters are there
            _refuse_shared(params, module)
            if self.merge_groups:
                params[:] = _merged(params, {'lr': self.base_lr, 'weight_decay': self.base_wd})

    def __call__(self, model: nn.Module) -> Any:
        """Build the optimizer wrapper; see the default constructor."""
        if self.stem_lr_mult != 1 and not any(
                isinstance(module, OREPAStemConv2d) and module.weight0.vector.requires_grad
                for module in model.modules()):
            print_log(f'stem_lr_mult={self.stem_lr_mult} has no effect: the model has no linear '
                      'deep stem, or a frozen one (frozen_stages >= 0)', 'current')
        wrapper = super().__call__(model)
        wrapper.optimizer.register_load_state_dict_pre_hook(_refuse_other_groups)
        return wrapper


def _merged(groups: list[dict], defaults: dict) -> list[dict]:
    """One group of all those that are equal but for their parameters, in the order of the first."""
    defaults = {key: value for key, value in defaults.items() if value is not None}
    found: list[tuple[dict, list[nn.Parameter]]] = []
    for group in groups:
        options = {**defaults, **{key: value for key, value in group.items() if key != 'params'}}
        for known, params in found:  # no dict: options may be lists
            if known == options:
                params.extend(group['params'])
                break
        else:
            found.append((options, list(group['params'])))
    return [{'params': params, **options} for options, params in found]


def _refuse_shared(groups: list[dict], model: nn.Module) -> None:
    """PyTorch refuses a parameter in two groups, but would step twice with it in one."""
    times = Counter(id(parameter) for group in groups for parameter in group['params'])
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [' = '.join(names[key]) for key, number in times.items() if number > 1]
    if shared:
        raise ValueError(f'parameters are shared: {shortened(shared)}; set '
                         'paramwise_cfg.bypass_duplicate=True to optimize each once')


def _refuse_other_groups(optimizer: Optimizer, state_dict: dict) -> None:
    """Say what to do if a state has other groups; param schedulers keep values by group, too."""
    saved, own = len(state_dict['param_groups']), len(optimizer.param_groups)
    theirs, ours = ([parameter for group in groups for parameter in group['params']]
                    for groups in (state_dict['param_groups'], optimizer.param_groups))
    number = len(ours)
    if number != len(theirs):
        return  # PyTorch says it
    if saved == own:
        for key, parameter in zip(theirs, ours):
            for moment in ('momentum_buffer', 'exp_avg'):
                found = state_dict['state'].get(key, {}).get(moment)
                if found is not None and found.shape != parameter.shape:
                    raise CheckpointError(
                        f'the optimizer to resume has as many parameter groups, {own}, but others '
                        f'in them: where it has a {moment} of shape {tuple(found.shape)}, this run '
                        f'has a parameter of shape {tuple(parameter.shape)}. To go on with it, '
                        'take the paramwise_cfg that it had')
        return
    option = '--cfg-options optim_wrapper.paramwise_cfg.merge_groups='
    raise CheckpointError(
        f'the optimizer to resume has {saved} parameter groups, that of this run {own} for the '
        f'same {number} parameters. To go on with it, ' + (
            f'add {option}False: it had one for each parameter' if saved == number
            else f'add {option}True: its groups were merged' if own == number
            else 'take the paramwise_cfg that it had'))
