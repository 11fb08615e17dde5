"""The base of every convolution layer whose kernel is generated from branches."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from ..errors import CheckpointError
from .constants import WithConstants
from .generated import GeneratedKernel
from .precision import without_autocast
from .sharing import _open, is_recorded, shared_kernel
from .stock import conv2d_like

#: Largest scale-relative error of a kernel that `set_kernel` takes for that kernel, at least;
#: in half precision 8 units of rounding.
_KERNEL_TOLERANCE = 1e-5


class ReparamConv2d(WithConstants, nn.Conv2d):
    """A 2-D convolution whose `weight` is generated from several branches.

    It is an `nn.Conv2d`, and computes `conv2d(x, weight) + bias`; but `weight` is
    no parameter. Reading it squeezes the branches; what is written into it, or
    assigned to it, goes into the branches by `set_kernel`. Code that walks over
    convolutions and asks for more than that has to ask for this class first.

    A subclass creates its parameters and constants, calls `reset_parameters()`
    at the end of its `__init__`, and implements `squeeze`, `reset_branches`,
    `_reference` and, if any kernel can be put into it, `_change_kernel`.

    The kernel is squeezed at each call, in float32 at least, also under autocast; where
    float32 products are allowed to be computed in TF32 or bfloat16, those of the
    squeeze are too. A context `cached()` squeezes once; the forward pass of an MMEngine model
    is one.

    Args:
        in_channels: `I`.
        out_channels: `o`.
        kernel_size: `k`, odd; a square window.
        stride: As in `torch.nn.Conv2d`.
        padding: As in `torch.nn.Conv2d`.
        dilation: As in `torch.nn.Conv2d`.
        groups: `g`.
        bias: Whether to add a learnable bias, `(o,)`.
        padding_mode: As in `torch.nn.Conv2d`.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the kernel is not an odd square, or the channels are not
            divisible by `groups`.
    """

    #: Whether a backward pass leaves the graph behind the kernel as it was, so that calls may
    #: share it. The graph that PyTorch records is gone through once.
    graph_is_reusable = False

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
    ) -> None:
        # The stock layer checks and normalises the arguments; it holds no memory.
        stock = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation,
                          groups, bias, padding_mode, device='meta')  # type: ignore[arg-type]
        height, width = stock.kernel_size
        if height != width or height % 2 == 0:
            raise ValueError(f'{type(self).__name__} needs an odd square kernel, '
                             f'got kernel_size={kernel_size}')
        nn.Module.__init__(self)  # not the stock layer's own, which would make a kernel
        self.__dict__.update({name: value for name, value in vars(stock).items()
                              if name not in self.__dict__})
        self.__dict__['_parameters'] = _Parameters()
        self._factory_kwargs = {'device': device, 'dtype': dtype}
        self.register_parameter('bias', nn.Parameter(
            torch.empty(out_channels, **self._factory_kwargs)) if bias else None)

    # --- to be given by a subclass -------------------------------------------

    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """Generate the kernel from the branches.

        Args:
            dtype: Type to compute in; the parameters' own by default.
            device: Where to compute; where the parameters are by default.

        Returns:
            Kernel of shape `(o, i, k, k)` in that type.
        """
        raise NotImplementedError

    def reset_branches(self) -> None:
        """Draw the branch weights and set the scaling vectors anew."""
        raise NotImplementedError

    def _change_kernel(self, change: Tensor) -> None:
        """Change the branches so that the kernel changes by this, as far as they can.

        Args:
            change: `(o, i, k, k)`, float64.

        Raises:
            TypeError: If the kernel is no linear function of the branches.
        """
        raise TypeError(f'the kernel of a {type(self).__name__} cannot be set: it is no linear '
                        'function of its branches')

    def _sources(self) -> list[Tensor]:
        """All that the kernel is generated from; empty where tensors alone do not tell."""
        modules = list(self.modules())
        if any('parametrizations' in module._modules or module._forward_pre_hooks
               for module in modules):
            return []
        return [tensor for module in modules
                for tensors in (module._parameters, module._buffers)
                for tensor in tensors.values() if tensor is not None]

    # --- as a convolution ----------------------------------------------------

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """`(o, i, k, k)`."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def branch_keys(self, prefix: str = '') -> set[str]:
        """What a checkpoint holds of the branches, without the bias, which plain layers have too.

        Args:
            prefix: What the layer's keys begin with there.
        """
        return self.state_dict(prefix=prefix).keys() - {f'{prefix}bias'}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters: the branches, and the bias as `Conv2d` does."""
        self.reset_branches()
        if self.bias is not None:
            fan_in = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    def init_weights(self) -> None:
        """Keep the values: MMCV gives a convolution that has this method none of its own.

        The branches were initialised when the layer was made, and MMEngine calls
        this after its own rules, which shall stay.
        """

    def _read_weight(self) -> Tensor:
        try:
            kernel = self._generate()
        except AttributeError as error:  # nn.Module would say that there is no weight
            raise RuntimeError(f'the kernel of this {type(self).__name__} cannot be generated: '
                               f'{error}') from error
        if is_recorded() or type(kernel) is not Tensor or kernel.is_inference():
            return kernel
        # laid out as a stock kernel is, since random numbers come in the order of memory
        return GeneratedKernel.of(self, kernel.contiguous())

    def _write_weight(self, kernel: Tensor) -> None:
        if not isinstance(kernel, Tensor):
            raise TypeError(f'the weight of a {type(self).__name__} is generated: a kernel of '
                            f'shape {self.kernel_shape} can be put into it, got {kernel!r}')
        self.set_kernel(kernel)

    #: The generated kernel, `(o, i, k, k)`, in the dtype of the parameters. Gradients flow
    #: through it. What is assigned, or written into it, into a view of it, or through
    #: `weight.data`, goes into the branches, see `set_kernel`.
    weight: Any = property(_read_weight, _write_weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'weight':  # nn.Module does not ask properties
            self._write_weight(value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module does; a `weight` goes into the branches.

        Args:
            name: Of the parameter.
            param: Its value.
        """
        if isinstance(param, GeneratedKernel):  # prune, by the name of weight_orig
            _refuse('weight')
        if name == 'weight':
            self._write_weight(param)  # type: ignore[arg-type]  # None is refused there
        else:
            super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Feature map, `(N, I, H, W)`.

        Returns:
            Feature map, `(N, o, H', W')`, sizes as of `torch.nn.Conv2d`.
        """
        if isinstance(x, fx.Proxy):  # one step of a traced graph, or the kernel would be a constant
            if x.tracer.root is self:
                raise TypeError(f'a {type(self).__name__} is one step of a traced graph: trace a '
                                'module that contains it')
            return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})
        kernel = (self._generate() if torch.compiler.is_compiling() or not _open.contexts
                  else shared_kernel(self))
        return self._conv_forward(x, kernel, self.bias)

    def _generate(self) -> Tensor:
        """Squeeze in float32 at least, also under autocast; return in our own dtype."""
        reference = self._reference()
        # torch.promote_types would be counted, and cost, as an operation of each layer
        dtype = torch.float64 if reference.dtype is torch.float64 else torch.float32
        with without_autocast(reference.device):
            return self.squeeze(dtype).to(reference.dtype)

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor, bias: Tensor | None = None, *, strict: bool = True
                   ) -> float:
        """Let the block generate a given kernel, through its origin branch.

        All other branches stay as they are. Computed in float64, then rounded to
        the dtype of the branches; what that leaves is corrected once, as far as
        other values can make up for it (in a stem they can).

        Args:
            kernel: `(o, i, k, k)`, any dtype and device.
            bias: `(o,)`; None leaves the bias as it is.
            strict: Raise if the block cannot generate the kernel. Otherwise it
                generates the nearest one that it can.

        Returns:
            By how much the kernel is missed: largest absolute difference over
            the largest absolute value.

        Raises:
            ValueError: If a shape is another, a value is not finite, there is a
                bias but the layer has none, or the kernel is missed: a scale of
                the origin branch is zero, or a stem is too narrow. The layer is
                left as it was.
            TypeError: If the kernel is no linear function of the branches.
        """
        reference, device = self._reference(), self._exact_device()
        if tuple(kernel.shape) != self.kernel_shape:
            raise ValueError(f'{type(self).__name__} needs a kernel of shape {self.kernel_shape}, '
                             f'got {tuple(kernel.shape)}')
        if bias is not None and (self.bias is None or bias.shape != self.bias.shape):
            raise ValueError(f'{type(self).__name__} has ' + (
                'no bias' if self.bias is None else f'a bias of shape {tuple(self.bias.shape)}')
                + f', got one of shape {tuple(bias.shape)}')
        if reference.is_meta or kernel.is_meta:
            return 0.0  # shapes only
        if not kernel.isfinite().all():
            raise ValueError('the kernel to be set holds values that are not finite')
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        wanted = kernel.detach().to(device).double()
        for _ in range(2):
            self._change_kernel(wanted - self.squeeze(torch.float64, device))
        missed = (wanted - self.squeeze(torch.float64, device)).abs().max().item()
        missed /= wanted.abs().max().item() or 1.0
        tolerance = max(_KERNEL_TOLERANCE, 8 * torch.finfo(reference.dtype).eps)
        if strict and not missed <= tolerance:
            self.load_state_dict(before)
            raise ValueError(
                f'this {type(self).__name__} cannot generate the kernel, it would miss it by '
                f'{missed:.1e} of its largest value: a scale of its origin branch is zero, or a '
                'stem is too narrow')
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        return missed

    @torch.no_grad()
    def start_from(self, kernel: Tensor, bias: Tensor | None = None) -> float:
        """Initialise all branches anew, so that the block generates a given kernel.

        How the other branches start is the block's option `start`; by default
        `zero`: each contributes nothing, and has a gradient.

        Args:
            kernel: `(o, i, k, k)`, any dtype and device.
            bias: `(o,)`; None leaves the bias as it is.

        Returns:
            By how much the kernel is missed, as `set_kernel`: 0 in the dtype of the
            branches, unless the start is `published` or the block is a stem.

        Raises:
            ValueError: As `set_kernel`. The layer is left as it was.
            TypeError: As `set_kernel`.
        """
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        try:
            self._reset_to_start_from()
            return self.set_kernel(kernel, bias)
        except (TypeError, ValueError):
            self.load_state_dict(before)
            raise

    def _reset_to_start_from(self) -> None:
        """Initialise the branches around a kernel that is given next."""
        self.reset_branches()

    # --- re-parameterization -------------------------------------------------

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor | None]:
        """The one convolution that this block equals, computed in float64.

        Returns:
            Kernel `(o, i, k, k)` and bias `(o,)` or None, in float64; on the CPU
            if the layer's device has no float64.
        """
        device = self._exact_device()
        with torch.no_grad():
            bias = None if self.bias is None else self.bias.to(device).double()
            return self.squeeze(torch.float64, device), bias

    def to_conv2d(self) -> nn.Conv2d:
        """Build the stock convolution that this block equals.

        Dtype, device, memory format, training flag and `requires_grad` are kept.

        Returns:
            A new `torch.nn.Conv2d`; this layer is left as it is.
        """
        kernel, bias = self.equivalent_kernel_bias()
        conv = conv2d_like(self, kernel, bias, self._reference())
        # a mark, which a BN behind it may take away
        conv.gained_bias = self.bias is None and bias is not None  # type: ignore[assignment]
        return conv

    #: The name by which timm's `reparameterize_model` asks a layer what it equals.
    fuse = to_conv2d

    def switch_to_deploy(self) -> None:
        """Refuse: a layer cannot replace itself, and a walker that only calls this would go on.

        Raises:
            RuntimeError: Always; it says what to call.
        """
        raise RuntimeError(f'a {type(self).__name__} cannot re-parameterize itself in place: call '
                           'orepa_mm.reparameterize(model), which replaces every such layer')

    # --- checkpoints -----------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f'{prefix}weight'
        if key in state_dict and not self.branch_keys(prefix) & state_dict.keys():
            if tuple(state_dict[key].shape) == self.kernel_shape:
                # A runner would only warn, and go on with random weights.
                raise CheckpointError(
                    f'{prefix[:-1]} is in training form ({type(self).__name__}), but the '
                    f'checkpoint holds a plain convolution ({key}). Load it into the plain model '
                    'and expand that by orepa_mm.expand, or load it by load_from, init_cfg or '
                    'mmengine.runner.load_checkpoint, which expand it for OREPA; or build the '
                    'model without branches (deploy=True in our backbones).')
            # what a stock convolution says of another shape; its bias may fit
            local_metadata, strict, _, unexpected_keys, error_msgs = args
            error_msgs.append(
                f'size mismatch for {key}: copying a param with shape '
                f'{tuple(state_dict[key].shape)} from checkpoint, the shape in current model is '
                f'{self.kernel_shape}.')
            state_dict = {name: value for name, value in state_dict.items() if name != key}
            args = local_metadata, strict, [], unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Parameters(dict[str, 'nn.Parameter | None']):
    """Parameters by name; says what to do where old utilities of PyTorch look for `weight`."""

    def __missing__(self, name: str) -> NoReturn:
        _refuse(name)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            _refuse(name)
        super().__delitem__(name)


def _refuse(name: str) -> NoReturn:
    if name == 'weight':
        raise TypeError(
            'the weight of this convolution is generated from branches, and is no parameter that '
            'could be pruned, normalised or parametrized: take one of those that '
            "named_parameters() lists, e.g. name='weight_orepa_origin', or a plain convolution")
    raise KeyError(name)
