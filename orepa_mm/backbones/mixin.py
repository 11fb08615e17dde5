"""What turns a stock OpenMMLab backbone into its re-parameterizable version."""

from __future__ import annotations

import logging
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.logging import print_log
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import nn

from ..checkpoints import load_pretrained, pretrained_cfgs
from ..checkpoints.forms import is_branch_key
from ..errors import CheckpointError, ConfigError
from ..layers import DBBConv2d, adjacent_children, reparam_layers, replace_with_conv2d


class ReparamBackboneMixin:
    """Build the stock backbone beside it with convolutions that generate their kernel.

    Put before the stock class: `class OREPAResNet(OREPAMixin, ResNet)`. Every
    option of the stock class is kept.

    Args:
        *args: As of the stock class.
        deploy: Build the stock network, for re-parameterized weights.
        conv_cfg: Options of the conv layer type, e.g. `dict(single_init=True)`,
            or another type.
        **kwargs: As of the stock class.
    """

    #: Name under which the deployed form is registered, without this package.
    stock_type: str
    #: The conv layer type, with its options.
    default_conv_cfg: dict
    #: Whether the stock class has a `deploy` of its own.
    stock_has_deploy = False

    def __init__(self, *args: Any, deploy: bool = False, conv_cfg: dict | None = None,
                 **kwargs: Any) -> None:
        conv_cfg = None if deploy else {**self.default_conv_cfg, **(conv_cfg or {})}
        if self.stock_has_deploy:
            kwargs['deploy'] = deploy
        super().__init__(*args, conv_cfg=conv_cfg, **kwargs)
        self.deploy = deploy
        #: Whether the blocks start as published: no rule of the user's own for kernels.
        self.published_init = kwargs.get('init_cfg') is None

    @classmethod
    def stock_cfg(cls, cfg: dict) -> dict:
        """The config of the deployed form, which does not need this package.

        Args:
            cfg: Config of this backbone, without a `conv_cfg` that names a type of ours.
        """
        result = {**{key: value for key, value in cfg.items() if key != 'deploy'},
                  'type': cls.stock_type, 'init_cfg': None}
        if 'type' not in (cfg.get('conv_cfg') or {'type': None}):
            result['conv_cfg'] = None  # options of the layers that the stock class has not
        return result

    def init_weights(self) -> None:
        """Initialise as the stock class does, but load pretrained weights strictly.

        Blocks keep their published initialisation, which the stock class's own
        rule for `Conv2d` would change; an `init_cfg` of the user's own acts. Beside
        pretrained weights other rules have nothing to do: those are for all of the
        backbone. A deployed backbone without weights is warned of: trained from
        scratch it is the plain network.

        Raises:
            ConfigError: If pretrained weights are to be overridden in part.
        """
        pretrained = list(pretrained_cfgs(self.init_cfg))
        if pretrained:
            for init_cfg in pretrained:
                if init_cfg.get('override'):
                    raise ConfigError(
                        f'init_cfg of {type(self).__name__} loads pretrained weights and overrides '
                        f'a part of them ({init_cfg["override"]}), which is not supported: leave '
                        'override out, or change the weights in the file')
                load_pretrained(self, init_cfg['checkpoint'], init_cfg.get('prefix'))
            self._is_init = True
        else:
            if self.deploy:
                print_log(f'{type(self).__name__}(deploy=True) starts at random: it is the plain '
                          'network, and OREPA has no part in its training. To train with OREPA, '
                          'leave deploy=True out; to go on from re-parameterized weights, load '
                          'them (load_from, init_cfg).', 'current', logging.WARNING)
            first = not self.is_init  # the stock class does nothing a second time
            super().init_weights()
            if first and self.published_init:
                for layer in reparam_layers(self):
                    layer.reset_parameters()

    def switch_to_deploy(self) -> None:
        """Re-parameterize in place: afterwards this is the stock network.

        A second call does nothing.
        """
        replace_with_conv2d(self)
        self.deploy = True

    def _freeze_stages(self) -> None:
        """Freeze as the stock class does."""
        super()._freeze_stages()
        if self.frozen_stages < 0:
            return
        # of a 7 x 7 stock classes freeze the parameters only
        (self.stem if hasattr(self, 'stem') else self.conv1).eval()

    def train(self, mode: bool = True) -> ReparamBackboneMixin:
        """Set the mode; returns itself, as the stock class forgets to."""
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.deploy and any(key.startswith(prefix) and is_branch_key(key) for key in state_dict):
            raise CheckpointError(
                f'{type(self).__name__}(deploy=True) is in deploy form, but the checkpoint holds '
                'its training form (the branches). Re-parameterize the checkpoint with '
                'tools/reparam.py, or build the backbone without deploy=True.')
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResNetMixin(ReparamBackboneMixin):
    """For the ResNets of all three packages, which share their structure."""

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Build a stage, with deformable convolutions left as they are."""
        conv_cfg = self._stage_conv_cfg(**kwargs)
        if conv_cfg is None or kwargs.get('dcn') is None:
            return super().make_res_layer(**{**kwargs, 'conv_cfg': conv_cfg})
        # The stock block refuses a conv_cfg beside deformable convolutions.
        stage = super().make_res_layer(**{**kwargs, 'conv_cfg': None})
        for block in stage:
            _replace_convs(block, conv_cfg)
            if block.downsample is not None:
                _replace_convs(block.downsample, conv_cfg)
        return stage

    def _stage_conv_cfg(self, conv_cfg: dict | None, **kwargs: Any) -> dict | None:
        return conv_cfg


class OREPAMixin(ResNetMixin):
    """A ResNet with OREPA convolutions; arguments as of `ReparamBackboneMixin`.

    As in the authors' networks, the shortcut of a BasicBlock stays a plain
    1 x 1 convolution.
    """

    default_conv_cfg = {'type': 'OREPA'}

    def _stage_conv_cfg(self, conv_cfg: dict | None, **kwargs: Any) -> dict | None:
        # MMPretrain's blocks are told their expansion, the others know it
        expansion = kwargs.get('expansion') or kwargs['block'].expansion
        if conv_cfg is not None and conv_cfg['type'] == 'OREPA' and expansion == 1:
            return {'pointwise': False, **conv_cfg}  # the only 1 x 1 there is the shortcut
        return conv_cfg


class DBBMixin(ResNetMixin):
    """A ResNet with Diverse Branch Blocks; arguments as of `ReparamBackboneMixin`.

    Every k x k convolution with its BN is one block, except the stem's 7 x 7;
    1 x 1 convolutions stay plain, as published.
    """

    default_conv_cfg = {'type': 'DBB'}

    def __init__(self, *args: Any, conv_cfg: dict | None = None, norm_cfg: dict | None = None,
                 **kwargs: Any) -> None:
        norm_cfg = norm_cfg or {'type': 'BN', 'requires_grad': True}
        super().__init__(*args, conv_cfg={'norm_cfg': norm_cfg, **(conv_cfg or {})},
                         norm_cfg=norm_cfg, **kwargs)
        for parent, _, conv, name, norm in adjacent_children(self):
            if isinstance(conv, DBBConv2d) and isinstance(norm, _BatchNorm):
                parent._modules[name] = nn.Identity()

    def switch_to_deploy(self) -> None:
        """Re-parameterize in place: afterwards this is the stock network.

        The stock network has a BN behind every convolution. The bias of the
        re-parameterized block becomes the bias of that BN, which does nothing
        else. A second call does nothing.
        """
        super().switch_to_deploy()
        for parent, _, conv, name, norm in adjacent_children(self):
            if getattr(conv, 'reparameterized', False) and type(norm) is nn.Identity:
                parent._modules[name] = _bias_as_norm(conv, self.norm_cfg)


def _replace_convs(block: nn.Module, conv_cfg: dict) -> None:
    """Build the plain convolutions right below `block` anew, of another type."""
    for name, conv in list(block.named_children()):
        if type(conv) is nn.Conv2d:
            setattr(block, name, build_conv_layer(
                conv_cfg, conv.in_channels, conv.out_channels, conv.kernel_size,
                stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
                groups=conv.groups, bias=conv.bias is not None))


@torch.no_grad()
def _bias_as_norm(conv: nn.Conv2d, norm_cfg: dict) -> nn.Module:
    """Move the convolution's bias into a BN that does nothing else in eval mode."""
    norm = build_norm_layer(norm_cfg, conv.out_channels)[1].to(conv.weight)
    norm.weight.fill_(1)
    norm.bias.copy_(conv.bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    for parameter in norm.parameters():
        parameter.requires_grad_(conv.weight.requires_grad)
    conv.register_parameter('bias', None)
    return norm.train(conv.training)
