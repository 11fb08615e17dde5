"""Blocks of other packages that re-parameterize themselves, each of them proven."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..layers import ReparamConv2d
from .convolutions import put_convolutions
from .copies import own_copy
from .proof import difference, exact, within

#: By which name a block re-parameterizes itself, and whose it is. The first that a block has is
#: called: where MMPretrain has `switch_to_deploy`, its `reparameterize` only returns tensors.
PROTOCOLS = {
    'switch_to_deploy': 'RepVGG, DBB and OREPA of their authors; MMPretrain, MMYOLO',
    'convert_to_deploy': 'RT-DETR, D-FINE; whole models of timm',
    'fuse_convs': 'ultralytics; afterwards `forward_fuse` is the forward pass',
    'fuse_block_residual_branches': 'super-gradients',
    'reparametrize': 'luxonis-train, Holocron',
    'reparameterize': 'timm',
    'fuse': 'timm; it returns what comes in place of the block',
}


def protocol(module: nn.Module) -> str | None:
    """By which method a module re-parameterizes itself; None if it has none, or did so already.

    Args:
        module: Any module.
    """
    done = getattr(module, 'reparameterized', False) or getattr(module, 'deploy', False) is True
    return None if done or isinstance(module, ReparamConv2d) else _protocol_of(type(module))  # type: ignore[arg-type]


@functools.cache
def _protocol_of(kind: type[nn.Module]) -> str | None:
    return next((name for name in PROTOCOLS if _takes_nothing(getattr(kind, name, None))), None)


def _takes_nothing(method: Any) -> bool:
    """Whether a method can be called without arguments: some `fuse` fuses what it is given."""
    if not inspect.isfunction(method):
        return False
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return all(parameter.default is not parameter.empty or parameter.kind in (
        parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters)


def is_ours(module: nn.Module) -> bool:
    """Whether a module is of this package, which tests its own.

    Args:
        module: Any module.
    """
    return type(module).__module__.partition('.')[0] == __name__.partition('.')[0]


def convert(block: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Let a block re-parameterize itself, if it stays the same function.

    A copy is converted first, in float64 if the block can, and compared with the
    block on random input, and so is every block inside of it. Dtype, device,
    training flags and `requires_grad`, which most of these methods forget, are kept.

    Args:
        block: Changed in place if it is converted.

    Returns:
        What comes in its place, often itself; None if it stays as it is. Then why
        it does; or, of a block that is converted, why that was not compared.
    """
    name, why = protocol(block), None
    assert name is not None
    for dtype in dict.fromkeys((exact(block), None)):  # None is its own
        before = _plain(own_copy(block), dtype)
        try:
            after = _call(own_copy(block), name, dtype)
        except Exception as error:  # whatever a method raises
            why = why or f'{type(error).__name__}: {error}'
            continue
        if after is None:
            return None, None
        others = dict(after.named_modules())
        parts = {part: module for part, module in before.named_modules()
                 if part in others and (not part or protocol(module))}
        changed = [part for part, module in parts.items() if not _equal(module, others[part])]
        if not changed:
            block.reparameterized = True  # type: ignore[assignment]  # it was before
            return block, None
        errors = [difference(parts[part], others[part]) for part in parts]
        wrong = [error for error in errors if error is not None and not within(error, dtype)]
        if wrong:
            return None, (f'by {name}() it would compute another function, off by '
                          f'{max(wrong):.2g} of its largest output')
        if errors[0] is None and any(map(protocol, list(before.modules())[1:])):
            return None, 'it runs on no random input: its blocks are converted one by one'
        settings = _Settings(block)
        after = _call(block, name, dtype)
        assert after is not None
        settings.restore(after)
        for part in changed:
            after.get_submodule(part).reparameterized = True  # type: ignore[assignment]
        return after, 'it runs on no random input' if errors[0] is None else None
    return None, f'{name}() failed: {why}'


@torch.no_grad()
def _plain(block: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A block in a dtype and in eval mode, with convolutions in place of our layers."""
    for module in block.modules():
        module.training = False
    return put_convolutions(block if dtype is None else block.to(dtype))


def _equal(before: nn.Module, after: nn.Module) -> bool:
    one, other = before.state_dict(), after.state_dict()
    return one.keys() == other.keys() and all(
        value.is_meta or torch.equal(value, other[key]) for key, value in one.items())


@torch.no_grad()
def _call(block: nn.Module, name: str, dtype: torch.dtype | None) -> nn.Module | None:
    """Re-parameterize a block in place; what comes in its place, None if it walks over a model."""
    reference = next(_plain(block, dtype).parameters(), None)
    block.reparameterized = True  # type: ignore[assignment]  # its method may call `reparameterize`
    with _FactoriesMake(dtype) if dtype is not None else contextlib.nullcontext():
        result = getattr(block, name)()
    if name == 'fuse' and result is block:
        return None
    after = result if isinstance(result, nn.Module) else block
    if hasattr(type(after), 'forward_fuse') and 'forward' not in vars(after):
        after.forward = after.forward_fuse  # type: ignore[assignment]
    for module in after.modules():
        module.training = False
    return after if reference is None else after.to(reference.device, dtype)


class _FactoriesMake(TorchFunctionMode):
    """What is made without a dtype gets this one; of this thread alone, unlike the default."""

    _FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.eye)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES and kwargs.get('dtype') is None:
            kwargs['dtype'] = self.dtype
        return func(*args, **kwargs)


class _Settings:
    """What such methods forget; what is new takes it from the module around it."""

    def __init__(self, block: nn.Module) -> None:
        self.tensors = {tensor: (tensor.dtype, tensor.requires_grad)
                        for tensor in (*block.parameters(), *block.buffers())}
        self.training = {key: module.training for name, module in block.named_modules()
                         for key in (name, module)}
        self.of = {}
        for name, module in block.named_modules():
            parameters = [p for p in module.parameters() if p.is_floating_point()]
            if parameters:
                self.of[name] = (parameters[0].device, parameters[0].dtype,
                                 any(p.requires_grad for p in parameters),
                                 any(map(_is_channels_last, parameters)))

    def restore(self, block: nn.Module) -> None:
        """Give a block that re-parameterized itself what it had."""
        for tensor, (dtype, trainable) in self.tensors.items():
            tensor.data = tensor.data.to(dtype)
            tensor.requires_grad_(trainable)
        for name, module in block.named_modules():
            module.training = next(self.training[key] for key in (module, *_around(name))
                                   if key in self.training)
            like = next((self.of[part] for part in _around(name) if part in self.of), None)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if (tensor is None or tensor in self.tensors or like is None
                        or not tensor.is_floating_point()):
                    continue
                device, dtype, trainable, channels_last = like
                tensor.data = tensor.data.to(device, dtype)
                if channels_last and tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(trainable)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            and not tensor.is_contiguous())


def _around(name: str) -> Iterator[str]:
    """The name of a module, then those of the modules around it; the root's is empty."""
    while name:
        yield name
        name = name.rpartition('.')[0]
    yield ''
