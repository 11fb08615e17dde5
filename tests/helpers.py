"""What several tests share."""

import contextlib
import functools
import gzip
import io
import json
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from tool_process import run_forked
from torch import nn

from orepa_mm.layers import (
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPARepVGGOnlineConv2d,
    OREPAStemConv2d,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared'
#: Numbers of the authors' implementation: blocks, and the keys of their files.
GOLDEN_DATA = ROOT / 'tests' / 'golden' / 'data'
#: And their whole networks, 13 MB, which are not in the repository.
GOLDEN = SHARED / 'golden'

needs_golden = pytest.mark.skipif(
    not any(GOLDEN.glob('net_*.pt')), reason=f"the authors' whole networks (net_*.pt, 13 MB) are "
    f'not in {GOLDEN}: they are not part of the repository')


#: mmcv's own operators; `make setup MMCV=lite` has a few of torchvision in their place.
needs_compiled = pytest.mark.skipif(
    hasattr(import_module('mmcv._ext'), 'OPERATORS'),
    reason='this mmcv has no compiled operators (make setup MMCV=full)')


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
    """A record of the authors' implementation: `block_*`, or `net_*` (see `needs_golden`)."""
    if name.startswith('net_'):
        return torch.load(GOLDEN / f'{name}.pt', weights_only=True)
    content = gzip.decompress((GOLDEN_DATA / f'{name}.pt.gz').read_bytes())
    return torch.load(io.BytesIO(content), weights_only=True)


@functools.cache
def official_keys():
    """{network: {key: shape}} of each checkpoint that the authors released."""
    content = gzip.decompress((GOLDEN_DATA / 'official_checkpoint_keys.json.gz').read_bytes())
    return json.loads(content)


def run(*command, fresh=False, **kwargs):
    """Run Python in the project's folder, in a process of its own; what it printed.

    If it is `fresh` or has options of `subprocess.run`, it imports everything itself, which costs
    seconds.
    """
    if not (fresh or kwargs):
        code, output = run_forked(command, ROOT)
    else:
        result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                                capture_output=True, text=True, **kwargs)
        code, output = result.returncode, result.stdout + result.stderr
    assert code == 0, output[-4000:]
    return output


#: Runs the command lines that its argument holds; prints what came of them, as JSON, at the end.
ONE_AFTER_ANOTHER = '''
import contextlib, io, json, runpy, sys, traceback
results = []
for command in json.loads(sys.argv[1]):
    output, code, sys.argv = io.StringIO(), 0, command
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(command[0], run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code)
                code = 1
        except Exception:
            traceback.print_exc()
            code = 1
    results.append((code, output.getvalue()))
print()
print(json.dumps(results))
'''


def run_each(*commands, **kwargs):
    """Run tools in one process, which saves the imports; exit code and output of each.

    For command lines that end before they leave anything behind: refusals and `-h`. Options are
    those of `run`.
    """
    lines = json.dumps([[str(word) for word in command] for command in commands])
    return json.loads(run('-c', ONE_AFTER_ANOTHER, lines, **kwargs).splitlines()[-1])


def exit_code(tool, *words):
    """Run a tool in this process, which saves the imports too; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [Path(tool).name, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / tool), run_name='__main__')
    return stop.value.code


def metrics_of_test(work_dir):
    """What a test tool of any package wrote into its `--work-dir`: {metric: value}."""
    path, = (path for path in Path(work_dir).glob('*/*.json') if path.parent.name == path.stem)
    return json.loads(path.read_text())


@contextlib.contextmanager
def on_meta_device():
    """Build models without memory; MMPretrain's ResNet reads values of a `linspace`."""
    linspace = functools.partial(torch.linspace, device='cpu')
    with torch.device('meta'), mock.patch.object(torch, 'linspace', linspace):
        yield


#: Where layers and re-parameterization are tested.
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


def randomize(module, seed=0):
    """Draw all parameters and BN statistics at random: fresh ones hide errors.

    The prior's scale starts at 0, a fresh BN at the identity.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    with torch.no_grad(), torch.device('cpu'):
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
    'online kxk of RepVGG': lambda **kw: OREPARepVGGOnlineConv2d(4, 4, 3, padding=1, **kw),
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
