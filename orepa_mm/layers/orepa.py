"""The OREPA blocks: k x k, the k x k of RepVGG, and 1 x 1.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826).
Parameter names are those of the authors' implementation, so that a block of
their checkpoints loads as it is, without its BN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import squeeze
from .base import ReparamConv2d
from .squeezed import squeezed


class _NamedConv2d:
    """What lets MMEngine's rules for `Conv2d` find a layer: they compare names of base classes.

    Whatever such a rule writes into `weight` goes into the branches.
    """


_NamedConv2d.__name__ = 'Conv2d'


class _BranchedConv2d(ReparamConv2d):
    """What the branched blocks share: scaling vectors, init options, the origin branch."""

    #: Initial scale of every branch, one row of `vector` each; the origin's is the first.
    initial_scales: tuple[float, ...]
    #: What a kernel is a sum of, by the row of `vector` that scales it.
    branch_names: tuple[str, ...]
    #: Name of the origin branch's tensor, `(o, i, k, k)`.
    origin: str
    #: Scaling vectors, one row for each branch, `(n, o)`.
    vector: nn.Parameter
    #: Whether the squeeze runs through `torch.compile`.
    compiled = False

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

    def _at(self, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
        """A branch tensor as the squeeze takes it."""
        if device is None and tensor.dtype == dtype:
            return tensor  # as in training, where each call counts
        # first to the device: it may be one without float64
        return tensor.to(device or tensor.device).to(dtype or self.vector.dtype)

    def _change_kernel(self, change: Tensor) -> None:
        """Change the origin branch, in which the kernel is linear; see the base class."""
        scale = self.vector[0].to(change).view(-1, 1, 1, 1)
        # where the scale is zero the branch has no say
        step = torch.where(scale == 0, torch.zeros_like(change), change / scale)
        origin = getattr(self, self.origin)
        origin.copy_(origin.to(step) + step)

    def _reference(self) -> Tensor:
        return self.vector

    def _arguments(self) -> tuple[str, dict[str, Tensor | None], dict[str, int]]:
        """Name of the block's function in `squeeze`, its tensors, its other arguments."""
        raise TypeError(f'{type(self).__name__} is no block')

    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """The sum of the branches, `(o, i, k, k)`; see the base class."""
        block, tensors, options = self._arguments()
        tensors = {name: None if tensor is None else self._at(tensor, dtype, device)
                   for name, tensor in tensors.items()}
        return squeezed(block, tensors, options, self.compiled)

    @torch.no_grad()
    def branch_kernels(self, scaled: bool = True, dtype: torch.dtype = torch.float64
                       ) -> dict[str, Tensor]:
        """What each branch adds to the kernel, `(o, i, k, k)` each; their sum is the kernel.

        Args:
            scaled: Whether each is multiplied by its scaling vector. Without it
                they are what the scaling vectors get to weigh.
            dtype: Type to compute in.
        """
        block, tensors, options = self._arguments()
        device = self._exact_device()
        tensors = {name: None if tensor is None else self._at(tensor, dtype, device)
                   for name, tensor in tensors.items()}
        scales: Any = tensors.pop('scales')
        found = {}
        for row, name in enumerate(self.branch_names):  # the kernel is linear in the scales
            alone = torch.zeros_like(scales)
            alone[row] = scales[row] if scaled else 1
            found[name] = getattr(squeeze, block)(**tensors, scales=alone, **options)
        return found


class _KxK(_BranchedConv2d):
    """The branches that the OREPA block and the one of RepVGG have in common."""

    #: What the authors' names of the branch tensors begin with.
    prefix: str
    #: `a` of the Kaiming-uniform initialisation.
    kaiming_slope: float
    #: See `squeeze.branch_windows`.
    windows: Tensor
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
        self._create_branches()
        self._register_constants()
        self.reset_parameters()

    def _create_branches(self) -> None:
        raise TypeError(f'{type(self).__name__} is no block')

    def _create(self, **shapes: tuple[int, ...]) -> None:
        """Create branch tensors by the names that the authors give them behind the prefix."""
        for name, shape in shapes.items():
            self.register_parameter(self.prefix + name.lstrip('_'), self._new_parameter(*shape))

    def _arguments_of(self, first: Tensor, pointwise: Tensor | None, scales: Tensor,
                      identities: int
                      ) -> tuple[str, dict[str, Tensor | None], dict[str, int]]:
        """The arguments, given those tensors that the blocks do not name alike."""
        def named(name: str) -> Tensor:
            return getattr(self, self.prefix + name)

        return 'orepa_kernel', dict(
            origin=named('origin'), average=named('avg_conv'), prior=named('pfir_conv'),
            first=first, second=named('1x1_kxk_conv2'), pointwise=pointwise,
            depthwise=named('gconv_dw'), separable=named('gconv_pw'), scales=scales,
            windows=self.windows), dict(identities=identities, groups=self.groups)

    def _make_constants(self) -> dict[str, Tensor]:
        k, o = self.kernel_size[0], self.out_channels
        # the first two and the last are those of the authors' files, which are compared with them
        constants = {f'{self.prefix}avg_avg': torch.full((k, k), 1 / k**2),
                     f'{self.prefix}prior': squeeze.frequency_prior(o, k),
                     'windows': squeeze.branch_windows(o, k, '1x1' in self.branch_names)}
        first = getattr(self, f'{self.prefix}1x1_kxk_idconv1', None)
        if first is not None:
            constants['id_tensor'] = squeeze.identity_pointwise(*first.shape[:2])
        return constants

    def reset_branches(self) -> None:
        """Kaiming-uniform weights, the identity-based 1 x 1 at zero, scales as published."""
        for name, weight in self.named_parameters(recurse=False):
            if name.startswith(self.prefix):
                nn.init.kaiming_uniform_(weight, a=self.kaiming_slope)
                weight.mul_(math.sqrt(self.init_hyper_para) if '_gconv_' in name
                            else self.init_hyper_para)
            if name.endswith('idconv1'):
                nn.init.zeros_(weight)
        nn.init.zeros_(self.vector)  # a row that no branch reads stays so
        self._reset_scales()


class _OREPAConv2d(_KxK):
    """The OREPA block without the name by which stock rules of initialisation find it."""

    initial_scales: tuple[float, ...] = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)
    branch_names: tuple[str, ...] = ('origin', 'average', 'prior', '1x1-kxk', '1x1', 'separable')
    prefix = 'weight_orepa_'
    origin = 'weight_orepa_origin'
    kaiming_slope = 0.0

    def _create_branches(self) -> None:
        o, k, g = self.out_channels, self.kernel_size[0], self.groups
        i, hidden = self.in_channels // g, self.in_channels * (1 if g <= 4 else 2)
        self._create(
            origin=(o, i, k, k), avg_conv=(o, i, 1, 1), pfir_conv=(o, i, 1, 1),
            _1x1_kxk_idconv1=(hidden, i, 1, 1), _1x1_kxk_conv2=(o, hidden // g, k, k),
            gconv_dw=(self.expansion * self.in_channels, 1, k, k),
            gconv_pw=(o, self.expansion * i, 1, 1))
        self.vector = self._new_parameter(len(self.branch_names), o)
        self._create(_1x1=(o, i, 1, 1))

    def _arguments(self) -> tuple[str, dict[str, Tensor | None], dict[str, int]]:
        return self._arguments_of(
            getattr(self, f'{self.prefix}1x1_kxk_idconv1'), getattr(self, f'{self.prefix}1x1'),
            self.vector, identities=1 if self.groups <= 4 else 2)


class OREPAConv2d(_OREPAConv2d, _NamedConv2d):
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


class OREPARepVGGConv2d(_KxK, _NamedConv2d):
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
    branch_names = ('origin', 'average', 'prior', '1x1-kxk', 'separable')
    prefix = 'weight_rbr_'
    origin = 'weight_rbr_origin'
    kaiming_slope = 1.0

    def _create_branches(self) -> None:
        o, k, g = self.out_channels, self.kernel_size[0], self.groups
        i, depthwise = self.in_channels // g, 1 < g == self.out_channels
        hidden = self.in_channels * (2 if depthwise else 1)
        self._create(
            origin=(o, i, k, k), avg_conv=(o, i, 1, 1), pfir_conv=(o, i, 1, 1),
            **{'_1x1_kxk_conv1' if depthwise else '_1x1_kxk_idconv1': (hidden, i, 1, 1)},
            _1x1_kxk_conv2=(o, hidden // g, k, k),
            gconv_dw=(self.expansion * self.in_channels, 1, k, k),
            gconv_pw=(o, self.expansion * i, 1, 1))
        self._has_unread_row = self.in_channels == self.out_channels and self.stride == (1, 1)
        self.vector = self._new_parameter(len(self.initial_scales) + self._has_unread_row, o)

    def _arguments(self) -> tuple[str, dict[str, Tensor | None], dict[str, int]]:
        identity_based = hasattr(self, 'id_tensor')
        return self._arguments_of(
            getattr(self, f'{self.prefix}1x1_kxk_{"idconv1" if identity_based else "conv1"}'), None,
            self.vector[:-1] if self._has_unread_row else self.vector,
            identities=int(identity_based))


class OREPAConv1x1(_BranchedConv2d, _NamedConv2d):
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
    branch_names = ('origin', 'product')
    origin = 'weight_or1x1_origin'

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

    def _arguments(self) -> tuple[str, dict[str, Tensor | None], dict[str, int]]:
        return 'orepa_1x1_kernel', dict(
            origin=self.weight_or1x1_origin, first=self.weight_or1x1_l2i_conv1,
            second=self.weight_or1x1_l2i_conv2, scales=self.vector), dict(groups=self.groups)
