"""The OREPA blocks: k x k, the k x k of RepVGG, and 1 x 1.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826).
Parameter names are those of the authors' implementation, so that a block of
their checkpoints loads as it is, without its BN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import squeeze
from .base import ReparamConv2d


class _BranchedConv2d(ReparamConv2d):
    """What the two branched blocks share: scaling vectors and init options."""

    #: Initial scale of every branch, one row of `vector` each.
    initial_scales: tuple[float, ...]

    def _set_init_options(self, single_init: bool, init_hyper_gamma: float,
                          init_hyper_para: float) -> None:
        self.single_init = single_init
        self.init_hyper_gamma = init_hyper_gamma
        self.init_hyper_para = init_hyper_para

    def _new_tensor(self, *shape: int) -> Tensor:
        return torch.empty(shape, **self._factory_kwargs)

    def _new_parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(self._new_tensor(*shape))

    def _reset_scales(self) -> None:
        for row, scale in zip(self.vector, self.initial_scales):
            nn.init.constant_(row, scale * math.sqrt(self.init_hyper_gamma))
        if self.single_init:
            nn.init.zeros_(self.vector)
            nn.init.ones_(self.vector[0])

    def _scales(self, dtype: torch.dtype | None) -> list[Tensor]:
        return self._tensor('vector', dtype).unbind()

    def _tensor(self, name: str, dtype: torch.dtype | None) -> Tensor:
        # an attribute, no parameter: pruning and parametrizations replace those
        return getattr(self, name).to(dtype or self.vector.dtype)

    def _reference(self) -> Tensor:
        return self.vector


class OREPAConv2d(_BranchedConv2d):
    """The OREPA block: a `k x k` convolution squeezed from six branches.

    Branches, in the order of the rows of `vector`: the original kernel, 1 x 1
    with average, 1 x 1 with frequency prior, 1 x 1 then k x k, 1 x 1, and
    depthwise-separable.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd.
        stride: This and the following as of `torch.nn.Conv2d`.
        padding: As of `torch.nn.Conv2d`.
        dilation: As of `torch.nn.Conv2d`.
        groups: `g`.
        bias: Whether to add a learnable bias.
        padding_mode: As of `torch.nn.Conv2d`.
        device: As of `torch.nn.Conv2d`.
        dtype: As of `torch.nn.Conv2d`.
        single_init: Start from the origin branch alone: its scale 1, all others 0.
        init_hyper_gamma: Multiplies the initial scales by its square root.
        init_hyper_para: Multiplies the initial branch weights; the two factors
            of the depthwise-separable branch by its square root each.

    Attributes:
        vector: Scaling vectors, `(6, o)`.
        weight_orepa_origin: `(o, i, k, k)`.
        weight_orepa_avg_conv: `(o, i, 1, 1)`.
        weight_orepa_pfir_conv: `(o, i, 1, 1)`.
        weight_orepa_1x1: `(o, i, 1, 1)`.
        weight_orepa_1x1_kxk_idconv1: `(t, i, 1, 1)`, added to the identity;
            `t` is `I` for up to 4 groups, else `2 I`.
        weight_orepa_1x1_kxk_conv2: `(o, t/g, k, k)`.
        weight_orepa_gconv_dw: `(8 I, 1, k, k)`.
        weight_orepa_gconv_pw: `(o, 8 i, 1, 1)`.
    """

    initial_scales = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)
    #: What the authors' names of the branch tensors begin with.
    prefix = 'weight_orepa_'
    #: `a` of the Kaiming-uniform initialisation.
    kaiming_slope = 0.0
    expansion = 8

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        single_init: bool = False,
        init_hyper_gamma: float = 1.0,
        init_hyper_para: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype)
        self._set_init_options(single_init, init_hyper_gamma, init_hyper_para)
        self._create_tensors()
        self.reset_parameters()

    def _create_tensors(self) -> None:
        self._create_branches(self.in_channels if self.groups <= 4 else 2 * self.in_channels)
        o, i = self.out_channels, self.in_channels // self.groups
        self.weight_orepa_1x1 = self._new_parameter(o, i, 1, 1)

    def _create_branches(self, hidden: int, identity: bool = True) -> None:
        """Create the five branches that both forms of the block have, and the scales.

        Args:
            hidden: `t`, hidden channels of the 1 x 1 then k x k branch.
            identity: Whether its 1 x 1 kernel is added to the identity.
        """
        o, k, g, e = self.out_channels, self.kernel_size[0], self.groups, self.expansion
        i = self.in_channels // g
        self.identity_based = identity
        for name, shape in (('origin', (o, i, k, k)), ('avg_conv', (o, i, 1, 1)),
                            ('pfir_conv', (o, i, 1, 1)), (self._first_name, (hidden, i, 1, 1)),
                            ('1x1_kxk_conv2', (o, hidden // g, k, k)),
                            ('gconv_dw', (e * self.in_channels, 1, k, k)),
                            ('gconv_pw', (o, e * i, 1, 1))):
            self.register_parameter(self.prefix + name, self._new_parameter(*shape))
        self.vector = self._new_parameter(len(self.initial_scales), o)
        self.register_buffer(f'{self.prefix}avg_avg', self._new_tensor(k, k))
        self.register_buffer(f'{self.prefix}prior', self._new_tensor(o, k, k))
        if identity:
            self.register_buffer('id_tensor', self._new_tensor(hidden, i, 1, 1))

    @property
    def _first_name(self) -> str:
        """The name of the first factor of the 1 x 1 then k x k branch."""
        return '1x1_kxk_idconv1' if self.identity_based else '1x1_kxk_conv1'

    def reset_branches(self) -> None:
        """Kaiming-uniform weights, the identity-based 1 x 1 at zero, scales as published."""
        k, para = self.kernel_size[0], self.init_hyper_para
        self._branch('avg_avg').fill_(1 / k**2)
        self._branch('prior').copy_(squeeze.frequency_prior(self.out_channels, k))
        for name, weight in self.named_parameters(recurse=False):
            if name.startswith(self.prefix):
                nn.init.kaiming_uniform_(weight, a=self.kaiming_slope)
                weight.mul_(math.sqrt(para) if '_gconv_' in name else para)
        if self.identity_based:
            self.id_tensor.copy_(squeeze.identity_pointwise(*self.id_tensor.shape[:2]))
            nn.init.zeros_(self._branch(self._first_name))
        self._reset_scales()

    def squeeze(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of the six branches, `(o, i, k, k)`; see the base class."""
        origin, average, prior, sequential, pointwise, separable = self._scales(dtype)
        centre = torch.zeros_like(self._branch('avg_avg', dtype))
        centre[centre.shape[0] // 2, centre.shape[1] // 2] = 1
        return self._squeeze_branches(
            dtype, origin, average, prior, sequential, separable,
            [(self._branch('1x1', dtype), pointwise.view(-1, 1, 1) * centre)])

    def _squeeze_branches(
        self, dtype: torch.dtype | None, origin: Tensor, average: Tensor, prior: Tensor,
        sequential: Tensor, separable: Tensor, more_windows: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Tensor:
        """The sum of the five common branches, given their scales, and of further windows."""
        first = self._branch(self._first_name, dtype)
        if self.identity_based:
            first = first + self._tensor('id_tensor', dtype)
        windows = [
            (self._branch('avg_conv', dtype),
             average.view(-1, 1, 1) * self._branch('avg_avg', dtype)),
            (self._branch('pfir_conv', dtype),
             prior.view(-1, 1, 1) * self._branch('prior', dtype)),
            *more_windows]
        kernel = squeeze.scale_kernel(self._branch('origin', dtype), origin)
        kernel = kernel + squeeze.scale_kernel(squeeze.squeeze_sequential(
            first, self._branch('1x1_kxk_conv2', dtype), self.groups), sequential)
        kernel = kernel + squeeze.squeeze_windows(*zip(*windows))
        return kernel + squeeze.scale_kernel(squeeze.squeeze_depthwise_separable(
            self._branch('gconv_dw', dtype), self._branch('gconv_pw', dtype), self.groups,
            self.expansion), separable)

    def _branch(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._tensor(self.prefix + name, dtype)


class OREPARepVGGConv2d(OREPAConv2d):
    """The 3 x 3 of the OREPA-RepVGG block: the OREPA block without its 1 x 1 branch.

    The block around it has a 1 x 1 convolution and an identity of its own,
    each with a BN. The authors' class is `OREPA_3x3_RepVGG`.

    Arguments and attributes are those of `OREPAConv2d`, with `weight_rbr_` in
    the names. `vector` has five rows; where the block has an identity branch,
    a sixth that nothing reads, which the authors' checkpoints hold. With one
    channel per group the first factor of the 1 x 1 then k x k branch is no
    identity-based one, and is called `weight_rbr_1x1_kxk_conv1`.
    """

    initial_scales = (0.25, 0.25, 0.0, 0.5, 0.5)
    prefix = 'weight_rbr_'
    kaiming_slope = 1.0

    def _create_tensors(self) -> None:
        depthwise = self.groups > 1 and self.groups == self.out_channels
        self._create_branches(self.in_channels * (2 if depthwise else 1), not depthwise)
        if self.in_channels == self.out_channels and self.stride == (1, 1):
            self.vector = self._new_parameter(6, self.out_channels)

    def reset_branches(self) -> None:
        """As in the base class, with `a = 1`; the unused row is zero."""
        nn.init.zeros_(self.vector)
        super().reset_branches()

    def squeeze(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of the five branches, `(o, i, k, k)`; see the base class."""
        return self._squeeze_branches(dtype, *self._scales(dtype)[:5])


class OREPAConv1x1(_BranchedConv2d):
    """The OREPA block for a 1 x 1 convolution: one kernel plus a product of two.

    The factor that is square starts as the identity; it is an ordinary
    trainable parameter, as the authors' is. They define the block for one
    group; with more, each group is such a block.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: 1.
        stride: This and the following as of `torch.nn.Conv2d`.
        padding: As of `torch.nn.Conv2d`.
        dilation: As of `torch.nn.Conv2d`.
        groups: `g`.
        bias: Whether to add a learnable bias.
        padding_mode: As of `torch.nn.Conv2d`.
        device: As of `torch.nn.Conv2d`.
        dtype: As of `torch.nn.Conv2d`.
        single_init: Start from the origin branch alone: its scale 1, the other 0.
        init_hyper_gamma: Multiplies the initial scales by its square root.
        init_hyper_para: Multiplies the initial weights other than the identity.

    Attributes:
        vector: Scaling vectors, `(2, o)`.
        weight_or1x1_origin: `(o, i, 1, 1)`.
        weight_or1x1_l2i_conv1: First factor, `(I, i, 1, 1)` if `o > I` else `(o, i, 1, 1)`.
        weight_or1x1_l2i_conv2: Second factor, `(o, i, 1, 1)` if `o > I` else `(o, o/g, 1, 1)`.

    Raises:
        ValueError: If `kernel_size` is not 1.
    """

    initial_scales = (1.0, 0.5)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        single_init: bool = False,
        init_hyper_gamma: float = 1.0,
        init_hyper_para: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, device, dtype)
        self._set_init_options(single_init, init_hyper_gamma, init_hyper_para)
        if self.kernel_size != (1, 1):
            raise ValueError(f'OREPAConv1x1 is a 1 x 1 convolution, got kernel_size={kernel_size}')
        i = self.in_channels // self.groups
        t = min(self.in_channels, self.out_channels)

        self.weight_or1x1_origin = self._new_parameter(self.out_channels, i, 1, 1)
        self.weight_or1x1_l2i_conv1 = self._new_parameter(t, i, 1, 1)
        self.weight_or1x1_l2i_conv2 = self._new_parameter(self.out_channels, t // self.groups, 1, 1)
        self.vector = self._new_parameter(len(self.initial_scales), self.out_channels)
        self.reset_parameters()

    def reset_branches(self) -> None:
        """Kaiming-uniform (a = 1) weights, the square factor as identity, scales as published."""
        square, free = self.weight_or1x1_l2i_conv2, self.weight_or1x1_l2i_conv1
        if self.out_channels > self.in_channels:
            square, free = free, square
        for weight in (self.weight_or1x1_origin, free):
            nn.init.kaiming_uniform_(weight, a=1.0).mul_(self.init_hyper_para)
        square.copy_(squeeze.identity_pointwise(*square.shape[:2]))
        self._reset_scales()

    def squeeze(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of both branches, `(o, i, 1, 1)`; see the base class."""
        origin, product = self._scales(dtype)
        return squeeze.scale_kernel(
            self._tensor('weight_or1x1_origin', dtype), origin,
        ) + squeeze.scale_kernel(squeeze.squeeze_sequential(
            self._tensor('weight_or1x1_l2i_conv1', dtype),
            self._tensor('weight_or1x1_l2i_conv2', dtype), self.groups), product)
