"""The networks whose costs are compared, built alike but for their convolutions."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from importlib import import_module

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import nn

from ..errors import ConfigError, NothingToConvertError
from ..export.stock import deploy_config
from ..layers import build_orepa_conv
from ..reparam import is_training_form, reparameterize
from .reference_blocks import as_published
from .variants import with_block_options

PLAIN, DBB = 'plain', 'DBB'
PUBLISHED, OURS = 'OREPA, one operation per branch', 'OREPA, ours'
COMPILED = 'OREPA, ours compiled'
DEPLOYED = 'OREPA, deployed'
REPVGG_PLAIN, REPVGG = 'RepVGG-A1 deployed', 'RepVGG-A1'
_DEPTH = 50
#: The `conv_cfg` of every row that is a ResNet.
_CONV_CFGS = {PLAIN: None, DBB: dict(type='DBB'), PUBLISHED: dict(type='OREPA'),
              OURS: dict(type='OREPA'), COMPILED: dict(type='OREPA', compile=True),
              DEPLOYED: dict(type='OREPA')}


@dataclass(frozen=True)
class Network:
    """A network to be measured, or why there is none.

    Attributes:
        name: Of the row.
        model: In training mode; None where it is not available.
        reference: Name of the network that it is compared with.
        missing: Why there is none.
    """

    name: str
    model: nn.Module | None
    reference: str
    missing: str = ''


def build_networks(names: list[str], device: torch.device, base_channels: int = 64,
                   reference: str = PLAIN) -> list[Network]:
    """Build backbones of random weights: ResNet-50s, and RepVGG-A1s if asked for.

    Nothing is frozen and every BN trains.

    Args:
        names: Of the rows: the constants of this module.
        device: Where they are to run.
        base_channels: Width of the first stage; 64 as published.
        reference: What a ResNet is compared with.
    """
    networks = []
    for name in names:
        repvgg = name in (REPVGG, REPVGG_PLAIN)
        other = REPVGG_PLAIN if repvgg else reference
        missing = missing_option(name)
        model = None
        if not missing:
            try:
                model = (_repvgg(name == REPVGG_PLAIN, base_channels) if repvgg
                         else resnet(name, base_channels)).to(device)
            except ImportError as error:
                missing = f'not available: {error}'
        networks.append(Network(name, model, other, missing))
    return networks


def resnet(name: str = PLAIN, base_channels: int = 64) -> nn.Module:
    """A ResNet-50 of the first toolbox that loads, in training mode, nothing frozen.

    Args:
        name: Of the row: the constants of this module.
        base_channels: Width of the first stage.

    Raises:
        ImportError: If neither MMDetection nor MMPretrain loads.
    """
    model = _stock_class('ResNet')(
        _DEPTH, base_channels=base_channels, stem_channels=base_channels, out_indices=(0, 1, 2, 3),
        conv_cfg=copy.copy(_CONV_CFGS[name]), frozen_stages=-1, norm_eval=False)
    model.train()  # a statement of its own: not every model's train() returns itself
    if name == PUBLISHED:
        return as_published(model)
    return reparameterize(model) if name == DEPLOYED else model


def config_networks(cfg: Config, device: torch.device) -> list[Network]:
    """Build the whole model of a training config in several forms, all in training mode.

    Args:
        cfg: From `orepa_mm.engine.load_config`.
        device: Where they are to run.

    Raises:
        ConfigError: If the model of the config is not in training form.
    """
    training = MODELS.build(cfg.model)
    try:
        require_training_form(training)
    except NothingToConvertError as error:
        raise ConfigError(str(error)) from error
    models = {PLAIN: MODELS.build(deploy_config(cfg).model),
              PUBLISHED: as_published(copy.deepcopy(training)), OURS: training}
    missing = missing_option(COMPILED)
    if not missing:
        models[COMPILED] = MODELS.build(ConfigDict(
            with_block_options(cfg.model, dict(compile=True))))
    for model in models.values():
        model.to(device).train()
    networks = [Network(name, model, PLAIN) for name, model in models.items()]
    return networks + [Network(COMPILED, None, PLAIN, missing)] * bool(missing)


def require_training_form(model: nn.Module) -> None:
    """Refuse a model in which nothing generates its kernel.

    Args:
        model: Of a training config.

    Raises:
        NothingToConvertError: If it is not in training form.
    """
    if not is_training_form(model):
        raise NothingToConvertError('the model is not in training form: it has no OREPA or DBB '
                                    'layer. Give the config that the model is trained with')


def missing_option(name: str) -> str:
    """Why the layers of a row cannot be built; empty if they can.

    Args:
        name: Of the row.
    """
    if name == COMPILED:
        try:
            build_orepa_conv(4, 4, 3, compile=True)
        except TypeError:
            return 'not available: the layer has no option `compile`'
    return ''


def _stock_class(name: str) -> type[nn.Module]:
    """A backbone class of the first toolbox that loads."""
    for package in ('mmdet', 'mmpretrain'):
        # AssertionError: a toolbox refuses a version of MMCV
        with contextlib.suppress(ImportError, AssertionError, AttributeError):
            return getattr(import_module(f'{package}.models.backbones'), name)
    raise ImportError(f'neither mmdet nor mmpretrain loads, which have the {name}')


def _repvgg(deploy: bool, base_channels: int) -> nn.Module:
    model = _stock_class('RepVGG')('A1', base_channels=base_channels, out_indices=(0, 1, 2, 3),
                                   deploy=deploy)
    model.train()
    return model
