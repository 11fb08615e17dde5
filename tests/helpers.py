"""What several tests share."""

import contextlib
import functools
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPARepVGGConv2d, OREPAStemConv2d

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
GOLDEN = SHARED / 'golden'

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f'the golden numbers are not here ({GOLDEN}): '
    'they come with a development checkout only')


#: Begins a script in which orepa_mm cannot be imported.
WITHOUT_US = "import sys; sys.modules['orepa_mm'] = None"
#: A stock package's own tools/test.py; the package is the first argument.
STOCK_TEST = '''
import runpy, sys
package = sys.argv.pop(1)
from importlib.util import find_spec
from pathlib import Path
script = Path(find_spec(package).origin).parent / '.mim' / 'tools' / 'test.py'
runpy.run_path(str(script), run_name='__main__')
'''


def golden(name):
    return torch.load(GOLDEN / f'{name}.pt', weights_only=True)


def run(*command, **kwargs):
    """Run Python in the project's folder; what it printed."""
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                            text=True, **kwargs)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


@contextlib.contextmanager
def on_meta_device():
    """Build models without memory; MMPretrain's ResNet reads values of a `linspace`."""
    linspace = functools.partial(torch.linspace, device='cpu')
    with torch.device('meta'), mock.patch.object(torch, 'linspace', linspace):
        yield


def randomize(module, seed=0):
    """Draw all parameters and BN statistics at random: fresh ones hide errors.

    The prior's scale starts at 0, a fresh BN at the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.5 if parameter.dim() == 1 or name.endswith('vector') else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
                layer.running_mean.copy_(
                    torch.randn(layer.running_mean.shape, generator=generator) * 0.1)
                layer.running_var.copy_(
                    torch.rand(layer.running_var.shape, generator=generator) + 0.5)
    return module


@torch.no_grad()
def vary_scales(model):
    """Let every BN and every scale differ from its initial value, which hides errors."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.add_(torch.randn_like(module.weight) * 0.1)
            module.bias.add_(torch.randn_like(module.bias) * 0.1)
        elif hasattr(module, 'vector'):
            module.vector.add_(torch.randn_like(module.vector) * 0.1)


def relative_error(found, expected):
    """Largest absolute difference over the largest absolute expected value."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


#: One layer of every kind, each for an input of shape (N, 4, H, W).
LAYERS = {
    'kxk': lambda **kw: OREPAConv2d(4, 6, 3, padding=1, **kw),
    'kxk strided, grouped, dilated': lambda **kw: OREPAConv2d(
        4, 8, 3, stride=2, padding=2, dilation=2, groups=2, **kw),
    'kxk of RepVGG': lambda **kw: OREPARepVGGConv2d(4, 4, 3, padding=1, **kw),
    'depthwise kxk of RepVGG': lambda **kw: OREPARepVGGConv2d(
        4, 4, 3, stride=2, padding=1, groups=4, **kw),
    '1x1': lambda **kw: OREPAConv1x1(4, 6, 1, stride=2, **kw),
    'stem': lambda **kw: OREPAStemConv2d(4, 6, 7, stride=2, padding=3, **kw),
}


def expected_output(layer, x):
    """From scratch: squeezed anew in float64, convolved by the stock layer."""
    return layer.to_conv2d()(x)


def train_one_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    with torch.enable_grad():
        layer(torch.randn(2, 4, 16, 12)).square().mean().backward()
    optimizer.step()
