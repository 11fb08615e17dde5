"""Re-parameterize a whole model: the stock network that computes the same."""

from __future__ import annotations

import copy
import logging
from collections import Counter

from mmengine.logging import print_log
from torch import nn

from ..backbones import ReparamBackboneMixin
from ..layers import reparam_layers, replace_with_conv2d


class NothingToConvertError(ValueError):
    """A model has no layer to re-parameterize, and none was converted before."""


def reparameterize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every layer that generates its kernel by the convolution it equals.

    Kernels are squeezed in float64. Dtype, device, memory format, training
    flag and `requires_grad` are kept. A model that is already in deploy form
    is returned as it is.

    Args:
        model: Any module; it may be such a layer itself.
        inplace: Change the given model. Otherwise a deep copy is changed.

    Returns:
        The model in deploy form.

    Raises:
        NothingToConvertError: If there is nothing to convert and the model was
            not converted before either. It is a `ValueError`.

    Example:
        >>> from torch import nn
        >>> from orepa_mm.layers import OREPAConv2d
        >>> reparameterize(nn.Sequential(OREPAConv2d(3, 8, 3, padding=1)))[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    if not is_training_form(model):
        if not any(_is_converted(module) for module in model.modules()):
            raise NothingToConvertError(
                f'{type(model).__name__} has no OREPA or DBB layer: there is nothing to '
                "re-parameterize. Was it built with conv_cfg=dict(type='OREPA') or an OREPA "
                'backbone?')
        return model if inplace else copy.deepcopy(model)
    if not inplace:
        model = copy.deepcopy(model)
    counts = Counter(type(layer).__name__ for layer in reparam_layers(model))
    for module in list(model.modules()):
        if isinstance(module, ReparamBackboneMixin):
            module.switch_to_deploy()  # it may have more to fuse than its layers
    model = replace_with_conv2d(model)
    print_log('re-parameterized ' + ', '.join(f'{n} {name}' for name, n in counts.items()),
              logger='current', level=logging.INFO)
    return model


def is_training_form(model: nn.Module) -> bool:
    """Whether any layer of the model still generates its kernel from branches.

    Args:
        model: Any module.
    """
    return next(reparam_layers(model), None) is not None


def _is_converted(module: nn.Module) -> bool:
    """Whether this module came out of a re-parameterization or was built deployed."""
    if isinstance(module, ReparamBackboneMixin):
        return module.deploy
    return getattr(module, 'reparameterized', False)
