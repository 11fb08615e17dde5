"""The OREPA blocks: k x k, 1 x 1, and the linear deep stem.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826).
Parameter names are those of the authors' implementation, so that a block of
their checkpoints loads as it is, without its BN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import squeeze
from .base import ReparamConv2d


class _BranchedConv2d(ReparamConv2d):
    """What the two branched blocks share: scaling vectors and init options."""

    #: Initial scale of every branch, one row of `vector` each.
    initial_scales: tuple[float, ...]
    #: Names of the tensors that the kernel is squeezed from.
    tensor_names: tuple[str, ...]

    def _set_init_options(self, single_init: bool, init_hyper_gamma: float,
                          init_hyper_para: float) -> None:
        self.single_init = single_init
        self.init_hyper_gamma = init_hyper_gamma
        self.init_hyper_para = init_hyper_para

    def _new_parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self._factory_kwargs))

    def _reset_scales(self) -> None:
        for row, scale in zip(self.vector, self.initial_scales):
            nn.init.constant_(row, scale * math.sqrt(self.init_hyper_gamma))
        if self.single_init:
            nn.init.zeros_(self.vector)
            nn.init.ones_(self.vector[0])

    def _tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What the kernel is squeezed from, by name, converted to `dtype`."""
        dtype = dtype or self.vector.dtype
        # attributes, not parameters: pruning and parametrizations replace those
        return {name: getattr(self, name).to(dtype) for name in self.tensor_names}

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
    tensor_names = (
        'vector', 'weight_orepa_origin', 'weight_orepa_avg_conv', 'weight_orepa_avg_avg',
        'weight_orepa_pfir_conv', 'weight_orepa_prior', 'weight_orepa_1x1_kxk_idconv1',
        'id_tensor', 'weight_orepa_1x1_kxk_conv2', 'weight_orepa_1x1', 'weight_orepa_gconv_dw',
        'weight_orepa_gconv_pw')
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
        o, k, g = self.out_channels, self.kernel_size[0], self.groups
        i = self.in_channels // g
        t = self.in_channels if g <= 4 else 2 * self.in_channels
        e = self.expansion

        self.weight_orepa_origin = self._new_parameter(o, i, k, k)
        self.weight_orepa_avg_conv = self._new_parameter(o, i, 1, 1)
        self.weight_orepa_pfir_conv = self._new_parameter(o, i, 1, 1)
        self.weight_orepa_1x1 = self._new_parameter(o, i, 1, 1)
        self.weight_orepa_1x1_kxk_idconv1 = self._new_parameter(t, i, 1, 1)
        self.weight_orepa_1x1_kxk_conv2 = self._new_parameter(o, t // g, k, k)
        self.weight_orepa_gconv_dw = self._new_parameter(e * self.in_channels, 1, k, k)
        self.weight_orepa_gconv_pw = self._new_parameter(o, e * i, 1, 1)
        self.vector = self._new_parameter(len(self.initial_scales), o)
        for name, shape in (('weight_orepa_avg_avg', (k, k)), ('weight_orepa_prior', (o, k, k)),
                            ('id_tensor', (t, i, 1, 1))):
            self.register_buffer(name, torch.empty(shape, **self._factory_kwargs))
        self.reset_parameters()

    def reset_branches(self) -> None:
        """Kaiming-uniform weights, the identity-based 1 x 1 at zero, scales as published."""
        k = self.kernel_size[0]
        self.weight_orepa_avg_avg.fill_(1 / k**2)
        self.weight_orepa_prior.copy_(squeeze.frequency_prior(self.out_channels, k))
        self.id_tensor.copy_(squeeze.identity_pointwise(*self.id_tensor.shape[:2]))
        para = self.init_hyper_para
        for name, weight in self.named_parameters(recurse=False):
            if name.startswith('weight_orepa_'):
                nn.init.kaiming_uniform_(weight, a=0.0)
                weight.mul_(math.sqrt(para) if '_gconv_' in name else para)
        nn.init.zeros_(self.weight_orepa_1x1_kxk_idconv1)
        self._reset_scales()

    def squeeze(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum of the six branches, `(o, i, k, k)`; see the base class."""
        w = self._tensors(dtype)
        origin, average, prior, sequential, pointwise, separable = w['vector'].unbind()
        k = self.kernel_size[0]
        centre = torch.zeros_like(w['weight_orepa_avg_avg'])
        centre[k // 2, k // 2] = 1
        kernel = squeeze.scale_kernel(w['weight_orepa_origin'], origin)
        kernel = kernel + squeeze.scale_kernel(squeeze.squeeze_sequential(
            w['weight_orepa_1x1_kxk_idconv1'] + w['id_tensor'],
            w['weight_orepa_1x1_kxk_conv2'], self.groups), sequential)
        kernel = kernel + squeeze.squeeze_windows(
            [w['weight_orepa_avg_conv'], w['weight_orepa_pfir_conv'], w['weight_orepa_1x1']],
            [average.view(-1, 1, 1) * w['weight_orepa_avg_avg'],
             prior.view(-1, 1, 1) * w['weight_orepa_prior'],
             pointwise.view(-1, 1, 1) * centre])
        return kernel + squeeze.scale_kernel(squeeze.squeeze_depthwise_separable(
            w['weight_orepa_gconv_dw'], w['weight_orepa_gconv_pw'], self.groups,
            self.expansion), separable)


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
    tensor_names = ('vector', 'weight_or1x1_origin', 'weight_or1x1_l2i_conv1',
                    'weight_or1x1_l2i_conv2')

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
        w = self._tensors(dtype)
        origin, product = w['vector'].unbind()
        return squeeze.scale_kernel(w['weight_or1x1_origin'], origin) + squeeze.scale_kernel(
            squeeze.squeeze_sequential(w['weight_or1x1_l2i_conv1'], w['weight_or1x1_l2i_conv2'],
                                       self.groups), product)


class OREPAStemConv2d(ReparamConv2d):
    """The linear deep stem: a large kernel composed of a chain of OREPA 3 x 3 kernels.

    Stride, padding and dilation belong to the one large convolution. The
    authors' class is `OREPA_LargeConv`.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd and larger than 3; `(k - 1) / 2` kernels are chained.
        stride: This and the following as of `torch.nn.Conv2d`.
        padding: As of `torch.nn.Conv2d`.
        dilation: As of `torch.nn.Conv2d`.
        groups: 1.
        bias: Whether to add a learnable bias.
        padding_mode: As of `torch.nn.Conv2d`.
        device: As of `torch.nn.Conv2d`.
        dtype: As of `torch.nn.Conv2d`.
        single_init: Passed to every 3 x 3 kernel generator.
        init_hyper_gamma: Passed to every 3 x 3 kernel generator.
        init_hyper_para: Passed to every 3 x 3 kernel generator.

    Attributes:
        weight0: Generator of the first kernel, `(o, I, 3, 3)`; `weight1` and so on
            of the following, `(o, o, 3, 3)`.

    Raises:
        ValueError: If `kernel_size` is not larger than 3 or `groups` is not 1.
    """

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
        if self.kernel_size[0] <= 3:
            raise ValueError('OREPAStemConv2d needs a kernel larger than 3 x 3 '
                             f'(OREPAConv2d is the block for 3 x 3), got {kernel_size}')
        if self.groups != 1:
            raise ValueError('OREPAStemConv2d has no meaning with more than one group, '
                             f'got groups={self.groups}; use OREPAConv2d')
        self.depth = (self.kernel_size[0] - 1) // 2
        options = dict(single_init=single_init, init_hyper_gamma=init_hyper_gamma,
                       init_hyper_para=init_hyper_para, bias=False,
                       **self._factory_kwargs)
        for j in range(self.depth):
            generator = OREPAConv2d(in_channels if j == 0 else out_channels, out_channels, 3,
                                    **options)
            self.add_module(f'weight{j}', generator)
        self.reset_parameters()

    @property
    def generators(self) -> list[OREPAConv2d]:
        """The generators of the chained 3 x 3 kernels, in order."""
        return [getattr(self, f'weight{j}') for j in range(self.depth)]

    def _reference(self) -> Tensor:
        return self.weight0.vector

    def reset_branches(self) -> None:
        """Initialise every generator as an `OREPAConv2d`."""
        for generator in self.generators:
            generator.reset_parameters()

    def squeeze(self, dtype: torch.dtype | None = None) -> Tensor:
        """The composed kernel, `(o, I, k, k)`; see the base class."""
        return squeeze.compose_stem([generator.squeeze(dtype) for generator in self.generators])
