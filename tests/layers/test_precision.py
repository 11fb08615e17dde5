"""Float32 at least, whatever the user allows, and devices without float64."""

import contextlib

import pytest
import torch
from helpers import LAYERS, randomize, relative_error
from torch import nn

from orepa_mm.layers import constants, precision
from orepa_mm.layers.precision import exact_float32, has_float64

BACKENDS = torch.backends
GETTERS = {
    'cuda.matmul.allow_tf32': lambda: BACKENDS.cuda.matmul.allow_tf32,
    'cudnn.allow_tf32': lambda: BACKENDS.cudnn.allow_tf32,
    'float32_matmul_precision': torch.get_float32_matmul_precision,
    'cuda.matmul': lambda: BACKENDS.cuda.matmul.fp32_precision,
    'cudnn.conv': lambda: BACKENDS.cudnn.conv.fp32_precision,
    'cudnn.rnn': lambda: BACKENDS.cudnn.rnn.fp32_precision,
    'mkldnn.matmul': lambda: BACKENDS.mkldnn.matmul.fp32_precision,
    'generic': lambda: BACKENDS.fp32_precision,
    'benchmark': lambda: BACKENDS.cudnn.benchmark,
}
SETTINGS = {
    'as it comes': lambda: None,
    'old': lambda: setattr(BACKENDS.cuda.matmul, 'allow_tf32', True),
    'old, cuDNN off': lambda: setattr(BACKENDS.cudnn, 'allow_tf32', False),
    'medium': lambda: torch.set_float32_matmul_precision('medium'),
    'new': lambda: setattr(BACKENDS.cuda.matmul, 'fp32_precision', 'tf32'),
    'new, everywhere': lambda: setattr(BACKENDS, 'fp32_precision', 'tf32'),
    'benchmark': lambda: setattr(BACKENDS.cudnn, 'benchmark', True),
}
pytestmark = pytest.mark.skipif(not precision._HAS_PRECISION,
                                reason='this PyTorch has no fp32_precision (2.9 and later have)')


@pytest.fixture(autouse=True)
def _settings_as_they_come():
    yield
    torch.set_float32_matmul_precision('highest')
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.fp32_precision = BACKENDS.cuda.matmul.fp32_precision = 'none'
    BACKENDS.cudnn.conv.fp32_precision = BACKENDS.cudnn.rnn.fp32_precision = 'tf32'
    BACKENDS.mkldnn.matmul.fp32_precision = BACKENDS.mkldnn.conv.fp32_precision = 'none'
    BACKENDS.cudnn.benchmark = False


def read():
    values = {}
    for name, getter in GETTERS.items():
        try:
            values[name] = getter()
        except RuntimeError:  # PyTorch refuses to read a mixture by its old names
            values[name] = 'mixed'
    return values


@pytest.mark.parametrize('setting', SETTINGS)
def test_every_setting_is_there_again(setting):
    SETTINGS[setting]()
    before = read()
    with contextlib.suppress(ZeroDivisionError), exact_float32():
        assert BACKENDS.cuda.matmul.fp32_precision in ('ieee', 'none')
        assert setting == 'benchmark' or not BACKENDS.cudnn.benchmark
        raise ZeroDivisionError
    assert read() == before


def test_comparisons_are_exact_and_repeatable():
    torch.set_float32_matmul_precision('medium')
    BACKENDS.cudnn.benchmark = True
    with exact_float32():
        assert BACKENDS.cuda.matmul.fp32_precision == 'ieee'
        assert BACKENDS.cudnn.conv.fp32_precision == 'ieee'
        assert BACKENDS.mkldnn.matmul.fp32_precision == 'ieee'
        assert not BACKENDS.cudnn.benchmark


def test_no_forward_pass_switches_what_belongs_to_the_process(layer, x, monkeypatch):
    """Other threads have it too. Autocast belongs to a thread, and is off in the squeeze."""
    seen, squeeze = [], type(layer).squeeze

    def watched(self, *args):
        seen.append((*read().values(), torch.is_autocast_enabled(x.device.type)))
        return squeeze(self, *args)

    monkeypatch.setattr(type(layer), 'squeeze', watched)
    torch.set_float32_matmul_precision('medium')
    before = tuple(read().values())
    for grad in (True, False):
        with torch.autocast(x.device.type, dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            layer(x)
    assert seen == [(*before, False)] * 2


def test_deployment_is_exact_whatever_is_allowed(layer):
    expected = layer.to_conv2d().weight
    torch.set_float32_matmul_precision('medium')
    with torch.autocast(expected.device.type, dtype=torch.bfloat16):
        assert torch.equal(layer.to_conv2d().weight, expected)


# --- devices without float64 -------------------------------------------------------------


@pytest.mark.parametrize('case', LAYERS)
def test_without_float64_on_the_device_the_cpu_squeezes(case, x, monkeypatch):
    layer = randomize(LAYERS[case]())
    expected = layer.to_conv2d()
    asked = []
    monkeypatch.setattr(constants, 'has_float64', lambda device: asked.append(device))
    kernel, bias = layer.equivalent_kernel_bias()
    assert asked
    assert (kernel.device.type, kernel.dtype) == ('cpu', torch.float64)
    assert bias.device.type == 'cpu'
    conv = layer.to_conv2d()
    assert conv.weight.device == x.device
    assert torch.equal(conv.weight, expected.weight)
    layer.set_kernel(torch.ones_like(conv.weight), strict=False)


def test_which_devices_have_float64(monkeypatch):
    assert has_float64(torch.device('cpu'))
    assert has_float64(torch.device('cuda'))

    def refuse(*args, **kwargs):  # what Apple's does
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, 'ones', refuse)
    assert not has_float64(torch.device('mps'))


def test_a_layer_is_no_constant_of_its_parameters_dtype():
    layer = nn.Sequential(*(build() for build in LAYERS.values())).double()
    assert all(b.dtype == torch.float32 for b in layer.buffers())
    assert relative_error(layer[0].squeeze(), layer[0].squeeze(torch.float64)) < 1e-12
