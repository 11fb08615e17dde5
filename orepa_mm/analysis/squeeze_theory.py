"""What squeezing must compute: its matrix products, and the bytes that pass through memory.

Shapes use the letters of the paper: `o` output channels, `I` input channels,
`g` groups, `i = I / g`, `k` kernel size, `t` hidden channels, `e` expansion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..layers import OREPAStemConv2d, ReparamConv2d, reparam_layers

#: By name of the product: what is multiplied, as a formula of its multiply-adds.
FORMULAS = {
    'windows': 'n o i k^2',
    'sequential': 't/g o i k^2',
    'separable': 'e o i k^2',
    'pointwise': 't/g o i',
    'chain': '9 I o^2 (5^2 + 7^2 + ... + k^2)',
}


@dataclass(frozen=True)
class Product:
    """A batched matrix product, `(batch, rows, inner) @ (batch, inner, columns)`.

    Attributes:
        name: A key of `FORMULAS`.
        batch: Number of independent products.
        rows: Rows of the first factor.
        inner: What is summed over.
        columns: Columns of the second factor.
    """

    name: str
    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds forward; the gradients of both factors take as many again each."""
        return self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class SqueezeCost:
    """What the layers of one kind cost at every training step, whatever the image's size.

    Attributes:
        kind: `1 x 1`, `3 x 3`, or `7 x 7 stem`.
        layers: How many there are.
        parameters: Values of all branches.
        kernel_values: Values of all generated kernels.
        forward: Multiply-adds of the products.
        step: The same, forward and backward.
        forward_bytes: Every branch read once, every kernel written once.
        step_bytes: And backward: every kernel's gradient and branch read once,
            every branch's gradient written once.
    """

    kind: str
    layers: int
    parameters: int
    kernel_values: int
    forward: int
    step: int
    forward_bytes: int
    step_bytes: int


def products(layer: ReparamConv2d) -> list[Product]:
    """The matrix products without which the kernel of an OREPA layer cannot be had.

    Args:
        layer: Any OREPA block, on any device.

    Raises:
        TypeError: If it is no OREPA block.
    """
    o, i, k, _ = layer.kernel_shape
    groups = layer.groups
    if isinstance(layer, OREPAStemConv2d):
        found = [product for generator in layer.generators for product in products(generator)]
        sizes = range(5, k + 1, 2)  # the kernel grows by 2 with every generator
        return found + [Product('chain', 1, o, 9 * o, i * size**2) for size in sizes]
    shapes = {name.split('_', 2)[-1]: parameter.shape
              for name, parameter in layer.named_parameters() if name.startswith('weight_')}
    if 'l2i_conv2' in shapes:
        return [Product('pointwise', groups, o // groups, shapes['l2i_conv2'][1], i)]
    if 'gconv_pw' not in shapes:
        raise TypeError(f'{type(layer).__name__} is no OREPA block')
    expansion = shapes['gconv_pw'][1] // i
    windows = sum(name in shapes for name in ('avg_conv', 'pfir_conv', '1x1'))
    return [Product('windows', o, i, windows, k**2),
            Product('sequential', groups, i, shapes['1x1_kxk_conv2'][1], o // groups * k**2),
            Product('separable', groups * i, o // groups, expansion, k**2)]


def squeeze_costs(model: nn.Module) -> list[SqueezeCost]:
    """What squeezing all OREPA layers of a model costs, by kind of layer.

    Args:
        model: In training form, float32.
    """
    kinds: dict[str, list[ReparamConv2d]] = {}
    for layer in reparam_layers(model):
        size = layer.kernel_size[0]
        kind = f'{size} x {size}' + ' stem' * isinstance(layer, OREPAStemConv2d)
        kinds.setdefault(kind, []).append(layer)
    costs = []
    for kind, layers in sorted(kinds.items()):
        parameters = sum(p.numel() for layer in layers for p in layer.parameters())
        kernels = sum(torch.Size(layer.kernel_shape).numel() for layer in layers)
        forward = sum(product.multiply_adds for layer in layers for product in products(layer))
        costs.append(SqueezeCost(kind, len(layers), parameters, kernels, forward, 3 * forward,
                                 4 * (parameters + kernels), 4 * (3 * parameters + 2 * kernels)))
    return costs


def memory_floor(parameters: int, kernels: int) -> dict[str, int]:
    """Bytes that a training step with momentum holds beside the activations of the plain model.

    Args:
        parameters: Values of all branches.
        kernels: Values of all generated kernels, which are read again in the backward pass.
    """
    return {'parameters': 4 * parameters, 'gradients': 4 * parameters, 'momentum': 4 * parameters,
            'kernels': 4 * kernels}


def conv_multiply_adds(model: nn.Module, input_shape: tuple[int, int, int, int]
                       ) -> Mapping[str, int]:
    """Multiply-adds of the convolutions of a stock model: what the feature maps cost.

    Args:
        model: A module on the device `meta`, where nothing is computed.
        input_shape: `(N, 3, H, W)`.

    Returns:
        `forward`, and `step` with the backward pass: the gradients of kernel and
        feature map cost as much again each; the image needs none.
    """
    counts: list[int] = []

    def note(layer: nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        counts.append(output.numel() * layer.weight[0].numel())

    hooks = [module.register_forward_hook(note) for module in model.modules()
             if isinstance(module, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(torch.empty(input_shape, device='meta'))
    finally:
        for hook in hooks:
            hook.remove()
    return {'forward': sum(counts), 'step': 3 * sum(counts) - counts[0]}


def products_alone(layers: list[ReparamConv2d], device: torch.device) -> Callable[[], None]:
    """A function that runs the products of the layers and nothing else, forward and backward.

    Args:
        layers: OREPA layers.
        device: Where to run.
    """
    calls: list[Callable[[], None]] = []

    def run(first: Tensor, second: Tensor, gradient: Tensor) -> None:
        torch.bmm(first, second)
        torch.bmm(gradient, second.transpose(1, 2))
        torch.bmm(first.transpose(1, 2), gradient)

    for layer in layers:
        for p in products(layer):
            calls.append(partial(run, *(torch.randn(p.batch, *shape, device=device) for shape in (
                (p.rows, p.inner), (p.inner, p.columns), (p.rows, p.columns)))))

    @torch.no_grad()
    def run_all() -> None:
        for call in calls:
            call()

    return run_all
