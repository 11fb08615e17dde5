"""RepVGG's block as one generated kernel: 3 x 3, 1 x 1 and identity are its branches.

The authors' OREPA-RepVGG block generates the 3 x 3 alone, and adds a 1 x 1 and an
identity on the feature map, with a BN each. Here the sum is made before the
convolution, so that one BN follows it.
"""

from __future__ import annotations

from torch import Tensor

from .orepa import _NamedConv2d, _OREPAConv2d


class OREPARepVGGOnlineConv2d(_OREPAConv2d, _NamedConv2d):
    """The OREPA block, initialised as in RepVGG, with an identity as its seventh branch.

    The identity is there as it is in RepVGG's block: where as many channels go
    in as come out, at stride 1. It adds its scale to the centre of the kernel
    from each channel to itself.

    Arguments and attributes are those of `OREPAConv2d`, with `weight_online_` in
    the names. `vector` has the six rows of that block, and a seventh, which
    starts at 1, where there is an identity.
    """

    initial_scales = (*_OREPAConv2d.initial_scales, 1.0)
    prefix = 'weight_online_'
    origin = 'weight_online_origin'
    kaiming_slope = 1.0

    def _create_branches(self) -> None:
        self.has_identity = self.in_channels == self.out_channels and self.stride == (1, 1)
        if self.has_identity:
            self.branch_names = (*self.branch_names, 'identity')
        super()._create_branches()

    def _arguments(self) -> tuple[str, dict[str, Tensor | None], dict[str, int]]:
        block, tensors, options = super()._arguments()
        return 'repvgg_online_kernel' if self.has_identity else block, tensors, options
