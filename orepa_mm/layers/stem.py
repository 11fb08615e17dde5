"""The linear deep stem of OREPA: a large kernel composed of small generated ones.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826). Parameter names are those of the authors' implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import squeeze
from .autograd import squeezed
from .base import ReparamConv2d
from .orepa import OREPABranches


class Generator(OREPABranches):
    """One 3 x 3 kernel of a stem: the branches of `OREPAConv2d`, and no convolution.

    Called, it gives its kernel: so whatever wraps modules (FSDP) finds a module that is
    called before its parameters are used.
    """

    def __init__(self, in_channels: int, out_channels: int, device: Any, dtype: Any,
                 *options: Any) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.groups = (3, 3), 1
        self._factory_kwargs = {'device': device, 'dtype': dtype}
        self._create_branches(*options)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """`(o, i, 3, 3)`."""
        return self.out_channels, self.in_channels, 3, 3

    def extra_repr(self) -> str:
        """Its channels."""
        return f'{self.in_channels}, {self.out_channels}'

    def forward(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """The kernel, `(o, i, 3, 3)`; see `squeeze`."""
        return self.squeeze(dtype, device)


class OREPAStemConv2d(ReparamConv2d, nn.Conv2d):
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
        start: This and the following are passed to every 3 x 3 kernel generator, see
            `OREPAConv2d`. A given kernel is put into the last of the chain.
        single_init: As of `OREPAConv2d`.
        init_hyper_gamma: As of `OREPAConv2d`.
        init_hyper_para: As of `OREPAConv2d`.

    Attributes:
        weight0: Generator of the first kernel, `(o, I, 3, 3)`; `weight1` and so on
            of the following, `(o, o, 3, 3)`.

    Raises:
        ValueError: If `kernel_size` is not larger than 3, `groups` is not 1, or there is no
            such start.
    """

    weight0: Generator
    graph_is_reusable = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        start: str | None = None,
        single_init: bool = False,
        init_hyper_gamma: float = 1.0,
        init_hyper_para: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        if self.kernel_size[0] <= 3:
            raise ValueError('OREPAStemConv2d needs a kernel larger than 3 x 3 '
                             f'(OREPAConv2d is the block for 3 x 3), got {kernel_size}')
        if self.groups != 1:
            raise ValueError('OREPAStemConv2d has no meaning with more than one group, '
                             f'got groups={self.groups}; use OREPAConv2d')
        self.depth = (self.kernel_size[0] - 1) // 2
        for j in range(self.depth):
            self.add_module(f'weight{j}', Generator(
                in_channels if j == 0 else out_channels, out_channels,
                *self._factory_kwargs.values(), start, single_init, init_hyper_gamma,
                init_hyper_para))
        self._arguments = tuple(f'kernel{j}' for j in range(self.depth))
        self.reset_parameters()

    @property
    def generators(self) -> list[Generator]:
        """The generators of the chained 3 x 3 kernels, in order."""
        return [getattr(self, f'weight{j}') for j in range(self.depth)]

    def _reference(self) -> Tensor:
        return self.weight0.vector

    def _sources(self) -> list[Tensor]:
        tensors: list[Tensor] = []
        for generator in self.generators:
            if type(generator) is not Generator:  # wrapped: what is in it comes and goes
                return []
            tensors += generator._sources()
        return tensors

    def reset_branches(self) -> None:
        """Initialise every generator as an `OREPAConv2d`."""
        for generator in self.generators:
            generator.reset_branches()

    def _reset_to_start_from(self) -> None:
        for generator in self.generators:
            generator._reset(generator.start or 'zero')

    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """The composed kernel, `(o, I, k, k)`; see the base class."""
        # called, not squeezed: see Generator
        return squeezed('stem_kernel', self._arguments,
                        [generator(dtype, device) for generator in self.generators], {})

    def _change_kernel(self, change: Tensor) -> None:
        """Change the last generator by the smallest step that does it; see the base class.

        The composed kernel is linear in the last one: a linear system with the
        same matrix for each output channel, solved by least squares.
        """
        *others, last = (generator(torch.float64, change.device) for generator in self.generators)
        chain = squeeze.stem_kernel(**dict(zip(self._arguments, others)))
        patches = squeeze.stem_patches(chain.transpose(0, 1))
        system = patches.transpose(0, 1).flatten(1)  # (9 o, I k^2)
        step = change.flatten(1) @ torch.linalg.pinv(system)
        self.generators[-1]._change_kernel(step.view_as(last))
