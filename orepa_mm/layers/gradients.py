"""Gradients of the squeezed kernels, by hand: few operations, nothing kept from the forward pass.

One function per block, the counterpart of the one in `squeeze`: it takes the same
tensors by name, and the gradient of the kernel. In each branch the gradient of the
branch with its scale left out is made first; a dot product per output channel with
the branch itself is the gradient of the scale, and scaled it is that of the branch.
So no product of the forward pass is needed a second time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .squeeze import scale_kernel, stacked_mixes, turn, turn_back


def orepa_kernel(
    grad: Tensor, *, origin: Tensor, average: Tensor, prior: Tensor, first: Tensor, second: Tensor,
    depthwise: Tensor, separable: Tensor, scales: Tensor, windows: Tensor,
    pointwise: Tensor | None = None, identities: int = 1, groups: int = 1, identity: bool = False,
) -> dict[str, Tensor]:
    """Gradients of `squeeze.orepa_kernel`, by the names of its tensors; none of `windows`."""
    out, i = origin.shape[:2]
    rows, area = windows.shape[1:]
    grad = grad.contiguous()
    flat = grad.view(out, i, area)
    found = {'origin': scale_kernel(grad, scales[0])}
    of_scales = [_row_dots(grad, origin)]

    bank = windows * scales[1:rows + 1].t().unsqueeze(-1)
    mixes = torch.bmm(bank, flat.transpose(1, 2)).transpose(0, 1).contiguous().unbind()
    names = ('average', 'prior') if pointwise is None else ('average', 'prior', None, 'pointwise')
    found.update({name: mix.view(average.shape) for name, mix in zip(names, mixes) if name})
    seen = torch.bmm(stacked_mixes(average, prior, pointwise).transpose(0, 1), flat)
    dots = _row_dots(seen.reshape(-1, area), windows.reshape(-1, area)).view(out, rows)

    turned_grad = turn(grad, groups)
    weight = first.reshape(groups, -1, i)
    hidden = torch.bmm(weight, turned_grad) if identities == 0 else torch.baddbmm(
        turned_grad if identities == 1 else turned_grad.repeat(1, identities, 1),
        weight, turned_grad)
    by_second = turn_back(hidden, second)
    of_sequential = _row_dots(second, by_second)
    found['second'] = _scaled_in_place(by_second, scales[3])

    channels = i * groups
    branch = separable.reshape(-1, channels, separable.shape[1] // i)
    seen = turned_grad.view(channels, -1, area)
    by_separable = torch.bmm(seen, depthwise.reshape(channels, -1, area).transpose(1, 2))
    by_separable = by_separable.transpose(0, 1).reshape(separable.shape)
    # its rows run with the group fastest, those of the kernel group by group
    of_separable = _row_dots(separable, by_separable).view(-1, groups).t().reshape(-1)
    scale = scales[5 if pointwise is not None else 4].view(groups, -1).t().reshape(-1)
    found['separable'] = _scaled_in_place(by_separable, scale)

    # scaled before they are turned: then a scale belongs to a long row
    turned = turn(scale_kernel(second, scales[3]), groups)
    found['first'] = torch.bmm(turned, turned_grad.transpose(1, 2)).view(first.shape)
    branch = scale_kernel(separable, scale).view(branch.shape)
    found['depthwise'] = torch.bmm(branch.permute(1, 2, 0), seen).view(depthwise.shape)

    of_scales += [dots[:, 0], dots[:, 1], of_sequential, *dots[:, 3:].unbind(1), of_separable]
    if identity:
        centres = grad.view(groups, i, i, area)[..., area // 2].diagonal(dim1=1, dim2=2)
        of_scales.append(centres.reshape(-1))
    of_rows = torch.stack(of_scales)
    unread = len(scales) - len(of_scales)
    found['scales'] = F.pad(of_rows, (0, 0, 0, unread)) if unread else of_rows
    return found


def orepa_1x1_kernel(grad: Tensor, *, origin: Tensor, first: Tensor, second: Tensor,
                     scales: Tensor, groups: int = 1) -> dict[str, Tensor]:
    """Gradients of `squeeze.orepa_1x1_kernel`, by the names of its tensors."""
    out, i = origin.shape[:2]
    grad = grad.contiguous()
    split = grad.view(groups, out // groups, i)
    factor = first.reshape(groups, -1, i)
    by_second = torch.bmm(split, factor.transpose(1, 2)).view(second.shape)
    scaled = scale_kernel(second, scales[1]).view(groups, out // groups, -1)
    return {
        'origin': scale_kernel(grad, scales[0]),
        'scales': torch.stack([_row_dots(grad, origin), _row_dots(second, by_second)]),
        'second': _scaled_in_place(by_second, scales[1]),
        'first': torch.bmm(scaled.transpose(1, 2), split).view(first.shape),
    }


def _row_dots(one: Tensor, other: Tensor) -> Tensor:
    """Dot products of the rows of two tensors, `(o,)`; one operation."""
    return torch.bmm(one.reshape(one.shape[0], 1, -1), other.reshape(one.shape[0], -1, 1)).view(-1)


def _scaled_in_place(kernel: Tensor, scale: Tensor) -> Tensor:
    return kernel.mul_(scale.view(-1, 1, 1, 1))
