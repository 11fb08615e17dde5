"""The OREPA blocks: k x k, the k x k of RepVGG, RepVGG's block as one kernel, and 1 x 1.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826).
Parameter names are those of the authors' implementation, so that a block of
their checkpoints loads as it is, without its BN.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import squeeze
from .autograd import squeezed
from .base import ReparamConv2d
from .constants import WithConstants

#: How the branches of a block may start.
STARTS = ('zero', 'published', 'single', None)


class Branch(NamedTuple):
    """What a kernel is a sum of.

    Attributes:
        name: What it is called here.
        scale: What its row of `vector` starts with, as published.
        zero_scale: The same at the zero start; as published, where it is None.
    """

    name: str
    scale: float
    zero_scale: float | None = None


class Factor(NamedTuple):
    """A tensor of a branch.

    Attributes:
        argument: What the squeeze calls it.
        key: What the authors call it, behind the block's prefix.
        shape: One letter for each axis: output channels `o`, input channels of a group `i`,
            hidden channels `t` and those of a group `h`, `d` and `e` of the separable
            branch, window `k`, `1`.
        initial: `kaiming`, `root` (the same, a factor of a product), `identity`, or `zero`.
        zero: Whether it is the factor that is zero at the zero start.
    """

    argument: str
    key: str
    shape: str
    initial: str
    zero: bool = False


class Branched(WithConstants):
    """What the branched blocks share: scaling vectors, the start, the squeeze.

    A block is data: its branches, one for each row of `vector`; their tensors, in
    the order in which they are registered; its function in `squeeze`.

    Attributes:
        branch_names: What a kernel is a sum of, by the row of `vector` that scales it.
        vector: Scaling vectors, one row for each branch, `(n, o)`.
        compiled: Whether the squeeze runs through `torch.compile`.
    """

    branches: tuple[Branch, ...]
    factors: tuple[Factor, ...]
    #: Name of its function in `squeeze`, and in `gradients`.
    block: str
    #: What the authors' names of the tensors begin with.
    prefix: str
    #: `a` of the Kaiming-uniform initialisation.
    kaiming_slope: float
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    branch_names: tuple[str, ...]
    vector: nn.Parameter
    compiled = False
    graph_is_reusable = True

    def _create_branches(self, start: str | None, single_init: bool, init_hyper_gamma: float,
                         init_hyper_para: float) -> None:
        """Create all tensors, and initialise them."""
        if start not in STARTS:
            raise ValueError(f'{type(self).__name__} has no start {start!r}: choose one of '
                             f'{", ".join(map(repr, STARTS))}')
        if single_init and start not in ('single', None):
            raise ValueError(f"single_init=True is start='single', but start={start!r} is given")
        self.start = 'single' if single_init else start
        self.init_hyper_gamma, self.init_hyper_para = init_hyper_gamma, init_hyper_para
        self.branch_names = tuple(branch.name for branch in self.branches)
        sizes = self._sizes()
        names = {}
        for factor in self.factors:
            if factor.argument == 'scales':
                names['scales'] = 'vector'
                shape = [self._rows(), self.out_channels]
            else:
                names[factor.argument] = self.prefix + factor.key
                shape = [sizes[letter] for letter in factor.shape]
            self.register_parameter(names[factor.argument], nn.Parameter(
                torch.empty(shape, **self._factory_kwargs)))
        self._register_constants()
        if 'windows' in self._buffers:
            names['windows'] = 'windows'
        #: The tensors of the squeeze, as it calls them and as they are called here.
        self._arguments, self._names = tuple(names), tuple(names.values())
        self._options = self._squeeze_options()
        self.reset_parameters()

    def _rows(self) -> int:
        """Number of rows of `vector`."""
        return len(self.branches)

    def _sizes(self) -> dict[str, int]:
        """What the letters of the shapes stand for."""
        i = self.in_channels // self.groups
        return {'1': 1, 'o': self.out_channels, 'i': i, 'k': self.kernel_size[0]}

    def _squeeze_options(self) -> dict[str, Any]:
        """The arguments of the squeeze that are no tensors."""
        return {'groups': self.groups}

    def reset_parameters(self) -> None:
        """Initialise all parameters."""
        with torch.no_grad():
            self.reset_branches()

    def reset_branches(self) -> None:
        """Initialise the branches as `start` says, as published by default."""
        self._reset(self.start or 'published')

    def _reset_to_start_from(self) -> None:
        self._reset(self.start or 'zero')
        if self.start != 'published':  # all others contribute nothing
            getattr(self, self.prefix + 'origin').zero_()

    def _reset(self, start: str) -> None:
        for factor in self.factors:
            if factor.argument == 'scales':
                continue
            weight = getattr(self, self.prefix + factor.key)
            if factor.initial == 'identity':
                weight.copy_(squeeze.identity_pointwise(*weight.shape[:2]))
            else:
                nn.init.kaiming_uniform_(weight, a=self.kaiming_slope)
                weight.mul_(math.sqrt(self.init_hyper_para) if factor.initial == 'root'
                            else self.init_hyper_para)
            if factor.initial == 'zero' or (factor.zero and start == 'zero'):
                nn.init.zeros_(weight)
        nn.init.zeros_(self.vector)  # a row that no branch reads stays so
        for row, branch in zip(self.vector, self.branches):
            scale = branch.scale
            if start == 'zero' and branch.zero_scale is not None:
                scale = branch.zero_scale
            nn.init.constant_(row, scale * math.sqrt(self.init_hyper_gamma)
                              if start != 'single' else 0.0)
        if start != 'published':
            nn.init.ones_(self.vector[0])

    def _change_kernel(self, change: Tensor) -> None:
        """Change the origin branch, in which the kernel is linear; see the base class."""
        scale = self.vector[0].to(change).view(-1, 1, 1, 1)
        # where the scale is zero the branch has no say
        step = torch.where(scale == 0, torch.zeros_like(change), change / scale)
        origin = getattr(self, self.prefix + 'origin')
        origin.copy_(origin.to(step) + step)

    def _reference(self) -> Tensor:
        return self.vector

    def _sources(self) -> list[Tensor]:
        """The tensors of the squeeze, as they are now: a parametrization makes new ones."""
        tensors = []  # a loop, since a comprehension is a frame more in every forward pass
        for name in self._names:
            tensors.append(getattr(self, name))
        return tensors

    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """The sum of the branches, `(o, i, k, k)`; see the base class."""
        tensors, own = self._sources(), self.vector.dtype
        if device is not None or not own == torch.float32 == (dtype or own):
            tensors = _converted(tensors, dtype or own, device)
        return squeezed(self.block, self._arguments, tensors, self._options, self.compiled)

    @torch.no_grad()
    def branch_kernels(self, scaled: bool = True, dtype: torch.dtype = torch.float64
                       ) -> dict[str, Tensor]:
        """What each branch adds to the kernel, `(o, i, k, k)` each; their sum is the kernel.

        Args:
            scaled: Whether each is multiplied by its scaling vector. Without it
                they are what the scaling vectors get to weigh.
            dtype: Type to compute in.
        """
        tensors = dict(zip(self._arguments, _converted(self._sources(), dtype,
                                                       self._exact_device())))
        scales = tensors.pop('scales')
        found = {}
        for row, name in enumerate(self.branch_names):  # the kernel is linear in the scales
            alone = torch.zeros_like(scales)
            alone[row] = scales[row] if scaled else 1
            found[name] = getattr(squeeze, self.block)(**tensors, scales=alone, **self._options)
        return found


def _converted(tensors: list[Tensor], dtype: torch.dtype, device: torch.device | None
               ) -> list[Tensor]:
    # first to the device: it may be one without float64
    return [tensor.to(device or tensor.device).to(dtype) for tensor in tensors]


class _Block(Branched, ReparamConv2d):
    """A branched block as a convolution."""

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
        start: str | None = None,
        single_init: bool = False,
        init_hyper_gamma: float = 1.0,
        init_hyper_para: float = 1.0,
    ) -> None:
        ReparamConv2d.__init__(self, in_channels, out_channels, kernel_size, stride, padding,
                               dilation, groups, bias, padding_mode, device, dtype)
        self._create_branches(start, single_init, init_hyper_gamma, init_hyper_para)

    reset_parameters = ReparamConv2d.reset_parameters


class OREPABranches(Branched):
    """The six branches of the OREPA block."""

    branches: tuple[Branch, ...] = (
        Branch('origin', 0.25), Branch('average', 0.25), Branch('prior', 0.0, 0.25),
        Branch('1x1-kxk', 0.5), Branch('1x1', 1.0), Branch('separable', 0.5))
    factors: tuple[Factor, ...] = (
        Factor('origin', 'origin', 'oikk', 'kaiming'),
        Factor('average', 'avg_conv', 'oi11', 'kaiming', zero=True),
        Factor('prior', 'pfir_conv', 'oi11', 'kaiming', zero=True),
        Factor('first', '1x1_kxk_idconv1', 'ti11', 'zero'),  # added to the identity
        Factor('second', '1x1_kxk_conv2', 'ohkk', 'kaiming', zero=True),
        Factor('depthwise', 'gconv_dw', 'd1kk', 'root'),
        Factor('separable', 'gconv_pw', 'oe11', 'root', zero=True),
        Factor('scales', 'vector', 'no', ''),
        Factor('pointwise', '1x1', 'oi11', 'kaiming', zero=True))
    block = 'orepa_kernel'
    prefix = 'weight_orepa_'
    kaiming_slope = 0.0
    #: Of the separable branch.
    expansion = 8
    #: See `squeeze.branch_windows`.
    windows: Tensor

    def _identities(self) -> int:
        """How many identities are added to the first factor of the 1 x 1 then k x k branch."""
        return 1 if self.groups <= 4 else 2

    def _sizes(self) -> dict[str, int]:
        hidden = self.in_channels * max(1, self._identities())
        return {**super()._sizes(), 't': hidden, 'h': hidden // self.groups,
                'd': self.expansion * self.in_channels,
                'e': self.expansion * self.in_channels // self.groups}

    def _squeeze_options(self) -> dict[str, Any]:
        return {'groups': self.groups, 'identities': self._identities(),
                'identity': 'identity' in self.branch_names}

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


class OREPAConv2d(OREPABranches, _Block, nn.Conv2d):
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
        start: `published`: scales and weights as the authors'. `zero`: the origin branch is
            the kernel, every other branch adds nothing and has a gradient. `single`: the
            scale of the origin is 1, all others are 0. None: published when the layer is
            made, zero when a kernel is given to `start_from`.
        single_init: The same as `start='single'`.
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

    Raises:
        ValueError: If there is no such start.
    """
    # nn.Conv2d stands among the bases since MMEngine's rules of initialisation ask for names


class OREPARepVGGConv2d(OREPABranches, _Block, nn.Conv2d):
    """The 3 x 3 of the OREPA-RepVGG block: the OREPA block without its 1 x 1 branch.

    The block around it has a 1 x 1 convolution and an identity of its own,
    each with a BN. The authors' class is `OREPA_3x3_RepVGG`.

    Arguments and attributes are those of `OREPAConv2d`, with `weight_rbr_` in
    the names. `vector` has five rows; where the block has an identity branch,
    a sixth that nothing reads, which the authors' checkpoints hold. With one
    channel per group the first factor of the 1 x 1 then k x k branch is no
    identity-based one, and is called `weight_rbr_1x1_kxk_conv1`.
    """

    branches = tuple(branch for branch in OREPABranches.branches if branch.name != '1x1')
    factors = OREPABranches.factors[:-1]
    prefix = 'weight_rbr_'
    kaiming_slope = 1.0

    def _create_branches(self, *options: Any) -> None:
        if self._identities() == 0:
            self.factors = tuple(
                Factor('first', '1x1_kxk_conv1', 'ti11', 'kaiming')
                if factor.argument == 'first' else factor for factor in self.factors)
        super()._create_branches(*options)

    def _identities(self) -> int:
        return 0 if 1 < self.groups == self.out_channels else 1

    def _sizes(self) -> dict[str, int]:
        sizes = super()._sizes()
        hidden = self.in_channels * (1 if self._identities() else 2)
        return {**sizes, 't': hidden, 'h': hidden // self.groups}

    def _rows(self) -> int:
        has_identity = self.in_channels == self.out_channels and self.stride == (1, 1)
        return len(self.branches) + has_identity


class OREPARepVGGOnlineConv2d(OREPABranches, _Block, nn.Conv2d):
    """The OREPA block, initialised as in RepVGG, with an identity as its seventh branch.

    The authors' OREPA-RepVGG block generates the 3 x 3 alone, and adds a 1 x 1 and
    an identity on the feature map, with a BN each. Here the sum is made before
    the convolution, so that one BN follows it. The identity is there as it is in
    RepVGG's block: where as many channels go in as come out, at stride 1. It
    adds its scale to the centre of the kernel from each channel to itself.

    Arguments and attributes are those of `OREPAConv2d`, with `weight_online_` in
    the names. `vector` has the six rows of that block, and a seventh, which
    starts at 1, where there is an identity.
    """

    prefix = 'weight_online_'
    kaiming_slope = 1.0

    def _create_branches(self, *options: Any) -> None:
        if self.in_channels == self.out_channels and self.stride == (1, 1):
            self.branches = (*self.branches, Branch('identity', 1.0, 0.0))
        super()._create_branches(*options)


class OREPAConv1x1(_Block, nn.Conv2d):
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
        start: As of `OREPAConv2d`.
        single_init: The same as `start='single'`.
        init_hyper_gamma: Multiplies the initial scales by its square root.
        init_hyper_para: Multiplies the initial weights other than the identity.

    Attributes:
        vector: Scaling vectors, `(2, o)`.
        weight_or1x1_origin: `(o, i, 1, 1)`.
        weight_or1x1_l2i_conv1: First factor, `(I, i, 1, 1)` if `o > I` else `(o, i, 1, 1)`.
        weight_or1x1_l2i_conv2: Second factor, `(o, i, 1, 1)` if `o > I` else `(o, o/g, 1, 1)`.

    Raises:
        ValueError: If `kernel_size` is not 1, or there is no such start.
    """

    branches = Branch('origin', 1.0), Branch('product', 0.5)
    block = 'orepa_1x1_kernel'
    prefix = 'weight_or1x1_'
    kaiming_slope = 1.0

    def __init__(self, in_channels: int, out_channels: int,
                 kernel_size: int | tuple[int, int] = 1, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)

    def _create_branches(self, *options: Any) -> None:
        if self.kernel_size != (1, 1):
            raise ValueError('OREPAConv1x1 is a 1 x 1 convolution, got kernel_size='
                             f'{self.kernel_size}')
        wide = self.out_channels > self.in_channels
        self.factors = (
            Factor('origin', 'origin', 'oi11', 'kaiming'),
            Factor('first', 'l2i_conv1', 'ti11', 'identity' if wide else 'kaiming'),
            Factor('second', 'l2i_conv2', 'oh11', 'kaiming' if wide else 'identity', zero=True),
            Factor('scales', 'vector', 'no', ''))
        super()._create_branches(*options)

    def _sizes(self) -> dict[str, int]:
        hidden = min(self.in_channels, self.out_channels)
        return {**super()._sizes(), 't': hidden, 'h': hidden // self.groups}
