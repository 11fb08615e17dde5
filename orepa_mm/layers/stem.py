"""The linear deep stem of OREPA: a large kernel composed of small generated ones.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022
(arXiv 2204.00826). Parameter names are those of the authors' implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import squeeze
from .base import ReparamConv2d
from .orepa import _NamedConv2d, _OREPAConv2d


class _Generator(_OREPAConv2d):
    """One 3 x 3 of a stem, which no rule of initialisation shall find.

    Rules go by names of classes, and one for a whole part of a model by `weight`.
    """

    weight = None  # type: ignore[assignment]  # taken away on purpose


class OREPAStemConv2d(ReparamConv2d, _NamedConv2d):
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

    weight0: _Generator

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
            generator = _Generator(in_channels if j == 0 else out_channels, out_channels, 3,
                                   **options)
            self.add_module(f'weight{j}', generator)
        self.reset_parameters()

    @property
    def generators(self) -> list[_Generator]:
        """The generators of the chained 3 x 3 kernels, in order."""
        return [getattr(self, f'weight{j}') for j in range(self.depth)]

    def _reference(self) -> Tensor:
        return self.weight0.vector

    def reset_branches(self) -> None:
        """Initialise every generator as an `OREPAConv2d`."""
        for generator in self.generators:
            generator.reset_parameters()

    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """The composed kernel, `(o, I, k, k)`; see the base class."""
        return squeeze.stem_kernel([generator.squeeze(dtype, device)
                                    for generator in self.generators])

    def _change_kernel(self, change: Tensor) -> None:
        """Change the last generator by the smallest step that does it; see the base class.

        The composed kernel is linear in the last one: a linear system with the
        same matrix for each output channel, solved by least squares.
        """
        *others, last = (generator.squeeze(torch.float64, change.device)
                         for generator in self.generators)
        patches = squeeze.stem_patches(squeeze.stem_kernel(others).transpose(0, 1))
        system = patches.transpose(0, 1).flatten(1)  # (9 o, I k^2)
        step = change.flatten(1) @ torch.linalg.pinv(system)
        self.generators[-1]._change_kernel(step.view_as(last))
