"""Find the first layer in which two forms of a model differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from itertools import zip_longest

from torch import Tensor, nn

from ..layers import ReparamConv2d
from .raw_outputs import flattened, scale_relative_error


def first_differing_layer(before: nn.Module, after: nn.Module, run: Callable[[nn.Module], object],
                          tolerance: float) -> str | None:
    """Find the first layer, in the order of execution, whose output differs.

    Compared are the outputs of the innermost modules that both forms have
    under the same name. A convolution that took over the bias of the BN behind
    it, or gave its own away, is compared together with that BN.

    Args:
        before: In eval mode.
        after: In eval mode, of the same dtype.
        run: Runs a model on the input that shows the difference.
        tolerance: Largest scale-relative error that counts as equal.

    Returns:
        The layer's name, or None if no such layer differs.
    """
    names = dict(before.named_modules()).keys() & dict(after.named_modules()).keys()
    outer = {'.'.join(name.split('.')[:length]) for name in names if name
             for length in range(name.count('.') + 1)}
    units = names - outer
    expected, found = (_recorded(model, units, run) for model in (before, after))
    pending = None
    for call, output in expected.items():
        if call not in found:
            continue
        name = call[0]
        if has_bias(before.get_submodule(name)) != has_bias(after.get_submodule(name)):
            pending = name
            continue
        error = max((scale_relative_error(one, other)
                     for one, other in zip_longest(output, found[call])), default=0.0)
        if not error <= tolerance:
            return (name if pending is None else pending) or 'itself'
        pending = None
    return None


def _recorded(model: nn.Module, names: Collection[str], run: Callable[[nn.Module], object]
              ) -> dict[tuple[str, int], list[Tensor]]:
    """Outputs of modules by (name, number of the call), in the order of execution."""
    outputs: dict[tuple[str, int], list[Tensor]] = {}
    calls: Counter[str] = Counter()

    def record(name: str, output: object) -> None:
        # a copy: the next layer may write into it
        outputs[name, calls[name]] = [tensor.clone() for _, tensor in flattened(output)]
        calls[name] += 1

    hooks = [model.get_submodule(name).register_forward_hook(
        lambda module, args, output, name=name: record(name, output)) for name in names]
    try:
        run(model)
    except Exception:
        pass  # what ran until then says where it starts
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def has_bias(layer: nn.Module) -> bool:
    """Whether the convolution that a layer is, or equals, has a bias.

    Args:
        layer: Any module.
    """
    if isinstance(layer, ReparamConv2d):
        return layer.equivalent_kernel_bias()[1] is not None
    return isinstance(layer, nn.Conv2d) and layer.bias is not None
