"""The base of every convolution layer whose kernel is generated from branches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..errors import CheckpointError
from . import scope
from .constants import WithConstants
from .generated import GeneratedKernel
from .kept import KeptKernel, is_recorded
from .precision import exact_products, has_float64
from .stock import conv2d_like

#: Largest scale-relative error of a kernel that `set_kernel` takes for that kernel, at least;
#: in half precision 8 units of rounding.
_KERNEL_TOLERANCE = 1e-5


class ReparamConv2d(WithConstants, ABC):
    """A 2-D convolution whose `weight` is generated from several branches.

    It is called, printed and read as `torch.nn.Conv2d` is, and computes
    `conv2d(x, weight) + bias`. It is no subclass of it, so that an
    initialisation rule for `Conv2d` does not reach into its branches.

    A subclass creates its parameters and constants, calls `reset_parameters()`
    at the end of its `__init__`, and implements `squeeze`, `reset_branches`,
    `_reference` and, if any kernel can be put into it, `_change_kernel`.

    In eval mode the kernel is generated once and kept as long as no gradient
    can flow to the branches. It is generated anew after `train()` and `eval()`
    (unless the layer is frozen), loading, moving to another device or dtype,
    and any in-place change of a parameter. Otherwise it is generated at each
    call, or once in a forward pass of the model, see `squeezed_once`. A write
    through `parameter.data` changes nothing that could be seen without waiting
    for the device: whoever writes so in eval mode, or in the middle of a forward
    pass, calls `forget_kernel()`. (MMEngine's moving averages write so, but its
    loops call `eval()` afterwards.) A CUDA graph that is captured in eval mode
    holds the kernel that is kept then.

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

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: Literal['zeros', 'reflect', 'replicate', 'circular']
    bias: nn.Parameter | None

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
        super().__init__()
        # The stock layer checks and normalises the arguments; it holds no memory.
        geometry = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation,
                             groups, bias, padding_mode, device='meta')  # type: ignore[arg-type]
        height, width = geometry.kernel_size
        if height != width or height % 2 == 0:
            raise ValueError(f'{type(self).__name__} needs an odd square kernel, '
                             f'got kernel_size={kernel_size}')
        for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation',
                     'groups', 'padding_mode', 'transposed', 'output_padding',
                     '_reversed_padding_repeated_twice'):
            setattr(self, name, getattr(geometry, name))
        self._factory_kwargs = {'device': device, 'dtype': dtype}
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **self._factory_kwargs))
        else:
            self.register_parameter('bias', None)
        self._kept: KeptKernel | None = None
        #: Whether a backbone froze the stage of this layer: its kernel outlasts `train()`.
        self.frozen = False
        self._evaluates = False

    #: Set by `nn.DataParallel`, whose replicas have no parameters.
    _is_replica = False
    extra_repr = nn.Conv2d.extra_repr
    #: What MMEngine's and MMCV's conv-BN functions call with a kernel of their own.
    _conv_forward: Any = nn.Conv2d._conv_forward

    # --- to be given by a subclass -------------------------------------------

    @abstractmethod
    def squeeze(self, dtype: torch.dtype | None = None, device: torch.device | None = None
                ) -> Tensor:
        """Generate the kernel from the branches.

        Args:
            dtype: Type to compute in; the parameters' own by default.
            device: Where to compute; where the parameters are by default.

        Returns:
            Kernel of shape `(o, i, k, k)` in that type.
        """

    @abstractmethod
    def reset_branches(self) -> None:
        """Draw the branch weights and set the scaling vectors anew."""

    def _change_kernel(self, change: Tensor) -> None:
        """Change the branches so that the kernel changes by this, as far as they can.

        Args:
            change: `(o, i, k, k)`, float64.

        Raises:
            TypeError: If the kernel is no linear function of the branches.
        """
        raise TypeError(f'the kernel of a {type(self).__name__} cannot be set: it is no linear '
                        'function of its branches')

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

    @property
    def weight(self) -> Tensor:
        """The generated kernel, `(o, i, k, k)`, in the dtype of the parameters.

        Gradients flow through it. What is written into it, into a view of it, or
        through `weight.data` goes into the branches, see `set_kernel`.
        """
        try:
            kernel = self._kernel()
            if is_recorded() or type(kernel) is not Tensor:
                return kernel
            # What is handed out may be written into: not a kernel that is kept. It is laid out
            # as a stock kernel is, since random numbers come in the order of memory.
            whole = (kernel.clone(memory_format=torch.contiguous_format)
                     if self._kept or scope.is_open() else kernel.contiguous())
            return whole if whole.is_inference() else GeneratedKernel.of(self, whole)
        except AttributeError as error:  # nn.Module would say that there is no weight
            raise RuntimeError(f'the kernel of this {type(self).__name__} cannot be generated: '
                               f'{error}') from error

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
        return self._conv_forward(x, self._kernel(), self.bias)

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
        self.forget_kernel()
        return missed

    # --- re-parameterization -------------------------------------------------

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor | None]:
        """The one convolution that this block equals, computed in float64.

        Returns:
            Kernel `(o, i, k, k)` and bias `(o,)` or None, in float64; on the CPU
            if the layer's device has no float64.
        """
        device = self._exact_device()
        with torch.no_grad(), exact_products(device):
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

    # --- the kernel that is kept -----------------------------------------------

    def forget_kernel(self) -> None:
        """Generate the kernel anew at the next call.

        For whoever writes into branches through `parameter.data` in eval mode, or in the
        middle of a forward pass.
        """
        self._kept = None
        scope.forget(self)

    def train(self, mode: bool = True) -> ReparamConv2d:
        """Set the mode as any module does; this forgets the kernel.

        Moving averages, and teachers made of them, are written through `.data`
        before they are evaluated. Only in a stage that its backbone froze the
        kernel stays: training loops call `train()` at every iteration, the
        backbone puts the stage back into eval mode, and nobody writes there.
        Evaluation, which is `eval()` in eval mode, may be one of averages: it
        squeezes anew, and so does the training after it.
        """
        evaluates = not mode and not self.training
        if evaluates or self._evaluates or not self.frozen:
            self.forget_kernel()
        self._evaluates = evaluates
        return super().train(mode)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        self.forget_kernel()
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.forget_kernel()
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

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without a kept kernel."""
        return {**self.__dict__, '_kept': None}

    # --- generation ----------------------------------------------------------------

    def _kernel(self) -> Tensor:
        """The kernel as the forward pass takes it: kept, if it may be."""
        if is_recorded() or self._is_replica:
            return self._generate()
        if self.training or self._gradient_can_flow():
            self._kept = None  # fused optimizers write without a trace
            return scope.shared_kernel(self, self._generate)
        if self._kept is not None and self._kept.holds_for(self):
            return self._kept.kernel
        # A tensor made in inference mode could not be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            kernel = self._generate()
        self._kept = KeptKernel.of(self, kernel)
        return kernel

    def _generate(self) -> Tensor:
        """Squeeze in float32 at least, also under autocast; return in our own dtype."""
        reference = self._reference()
        # torch.promote_types would be counted, and cost, as an operation of each layer
        dtype = torch.float64 if reference.dtype is torch.float64 else torch.float32
        with exact_products(reference.device):
            kernel = self.squeeze(dtype)
        return kernel.to(reference.dtype)

    def _gradient_can_flow(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def _exact_device(self) -> torch.device:
        device = self._reference().device
        return device if has_float64(device) else torch.device('cpu')
