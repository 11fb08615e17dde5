"""The optimizer constructor: the learning rate of the linear deep stem."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..layers import OREPAStemConv2d


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OREPAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with a learning rate of its own for the OREPA stem.

    The authors advise to adjust the learning rate of the linear deep stem when
    ImageNet weights are transferred: its weights are distributed unlike a plain
    stem's. All other options are those of the default constructor. The scaling
    vectors are decayed like weights, as the authors do.

    Args:
        optim_wrapper_cfg: As of the default constructor.
        paramwise_cfg: As of the default constructor, and `stem_lr_mult`: factor
            on the learning rate of every `OREPAStemConv2d`, beside factors of
            `custom_keys`. 1 by default.

    Raises:
        ValueError: If `stem_lr_mult` is negative or no number, or the optimizer
            has no `lr` that it could be applied to.

    Example:
        >>> optim_wrapper = dict(constructor='OREPAOptimWrapperConstructor',
        ...                      paramwise_cfg=dict(stem_lr_mult=0.1))
    """

    #: Options that a stock constructor does not know.
    own_options = ('stem_lr_mult',)

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.stem_lr_mult = paramwise_cfg.pop('stem_lr_mult', 1.0)
        if not isinstance(self.stem_lr_mult, (int, float)) or self.stem_lr_mult < 0:
            raise ValueError('paramwise_cfg.stem_lr_mult must be a number that is not negative, '
                             f'got {self.stem_lr_mult!r}')
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

    def __call__(self, model: nn.Module) -> Any:
        """Build the optimizer wrapper; see the default constructor."""
        if self.stem_lr_mult != 1 and not any(
                isinstance(module, OREPAStemConv2d) and module.weight0.vector.requires_grad
                for module in model.modules()):
            print_log(f'stem_lr_mult={self.stem_lr_mult} has no effect: the model has no linear '
                      'deep stem, or a frozen one (frozen_stages >= 0)', 'current')
        return super().__call__(model)
