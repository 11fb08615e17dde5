"""A forward pass waits for no device and makes no tensor from Python values.

On a CPU neither shows; a mode that sees every operation counts them.
"""

import contextlib
import os
import sys

import pytest
import torch
from helpers import LAYERS, randomize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from orepa_mm.layers import DBBConv2d, cached

#: Reads a value back from the device.
WAITS = {'_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'item', 'masked_select',
         'unique', 'allclose'}
#: Makes a tensor of Python values, which would be copied to the device.
FROM_THE_HOST = {'lift_fresh', 'lift_fresh_copy', 'scalar_tensor', 'fill', 'fill_', 'arange',
                 'linspace', 'eye', 'full', 'full_like', 'new_full', 'ones', 'zeros', 'new_zeros',
                 'zeros_like', 'ones_like', 'new_ones', 'zero_'}
EVERY_LAYER = {**LAYERS, 'DBB': lambda **kw: DBBConv2d(4, 6, 3, padding=1, **kw),
               'DBB dilated': lambda **kw: DBBConv2d(4, 6, 3, padding=2, dilation=2, **kw)}


class Recorder(TorchDispatchMode):
    """Notes the name of every operation, and copies between devices."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name.removeprefix('aten::'))
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.names.append('between devices')
        return result


def recorded(module, x, backward=False):
    with Recorder() as recorder:
        y = module(x)
        y = y if isinstance(y, torch.Tensor) else sum(part.sum() for part in y)
    if backward:
        y.sum().backward()
    return recorder.names


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('case', EVERY_LAYER)
def test_no_wait_and_nothing_from_the_host(case, mode, grad, x):
    layer = getattr(randomize(EVERY_LAYER[case]()), mode)()
    with torch.set_grad_enabled(grad):
        for call in range(2):
            found = set(recorded(layer, x)) & (WAITS | FROM_THE_HOST | {'between devices'})
            assert not found, (call, found)


@pytest.mark.parametrize('case', EVERY_LAYER)
def test_a_backward_pass_waits_for_nothing_either(case, x):
    layer = randomize(EVERY_LAYER[case]()).train()
    y = layer(x)
    grad = torch.ones_like(y)
    with Recorder() as recorder:
        y.backward(grad)
    assert len(recorder.names) > 5
    assert not set(recorder.names) & (WAITS | FROM_THE_HOST | {'between devices'})


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('case', EVERY_LAYER)
def test_forward_on_a_gpu_that_is_not_there(case, mode):
    """Fake CUDA tensors: a constant left on the CPU, or a value that is read, is an error."""
    with FakeTensorMode():
        layer = getattr(EVERY_LAYER[case](device='cuda'), mode)()
        x = torch.randn(2, 4, 16, 12, device='cuda')
        for _ in range(2):
            y = layer(x)
        assert y.device.type == 'cuda'


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_constants_move_with_the_parameters(device):
    """In float32 also where these are half, which would round them."""
    for build in LAYERS.values():
        layer = build().to(device, torch.float16)
        assert layer.to_conv2d().weight.dtype == torch.float16
        for name, constant in layer.named_buffers():
            assert (constant.device.type, constant.dtype) == (device, torch.float32), name
        if device == 'cpu':
            for (name, constant), fresh in zip(layer.named_buffers(), build().buffers()):
                assert torch.equal(constant, fresh), name


#: Python frames of this package in a forward pass, at most; in a stem for each of its 3 x 3.
FRAMES = 15


@pytest.mark.parametrize('context', [contextlib.nullcontext, cached])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('case', LAYERS)
def test_own_frames_of_a_forward_pass(case, grad, context, x):
    """Each costs as much as the launch of an operation."""
    layer = randomize(LAYERS[case]())

    def frames():
        found = []

        def note(frame, event, argument):
            if event == 'call' and 'orepa_mm' in frame.f_code.co_filename.split(os.sep):
                found.append(frame.f_code.co_qualname if sys.version_info >= (3, 11)
                             else frame.f_code.co_name)

        sys.setprofile(note)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
        return found

    with torch.set_grad_enabled(grad), context():
        first, second = frames(), frames()
    budget = FRAMES + FRAMES * (len(layer.generators) if case == 'stem' else 0)
    assert 4 < len(first) <= budget, first
    assert len(second) <= (FRAMES if context is cached else budget), second


def test_the_recorder_sees_what_it_is_to_see(x):
    """The test of the tests: each kind of wait, planted."""
    class Waits(nn.Module):
        def forward(self, x):
            return x * float(x.sum()) if x.sum() > 0 else x

    class Copies(nn.Module):
        def forward(self, x):
            return x * torch.tensor([2.0])

    class Writes(nn.Module):
        def forward(self, x):
            centre = torch.zeros(3, 3)
            centre[1, 1] = 1
            return x * centre.sum()

    assert set(recorded(Waits(), x)) & WAITS
    assert set(recorded(Copies(), x)) & FROM_THE_HOST
    assert set(recorded(Writes(), x)) & FROM_THE_HOST
