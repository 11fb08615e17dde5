"""Verification computes float32 exactly, and leaves the settings of precision as they were."""

import pytest
import torch
from helpers import randomize
from torch import nn

from orepa_mm.layers import OREPAConv2d
from orepa_mm.reparam import reparameterize, verify


@pytest.fixture
def _settings_kept():
    matmul = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.set_float32_matmul_precision('highest')


def precision_settings():
    """What every getter gives; some raise where two interfaces were mixed."""
    backends = torch.backends

    def read(getter):
        try:
            return getter()
        except RuntimeError as error:
            return type(error)

    return [read(getter) for getter in (
        lambda: backends.cuda.matmul.allow_tf32, lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.fp32_precision, lambda: backends.cudnn.conv.fp32_precision,
        lambda: backends.cudnn.rnn.fp32_precision, lambda: backends.mkldnn.matmul.fp32_precision,
        lambda: backends.mkldnn.conv.fp32_precision, torch.get_float32_matmul_precision,
        lambda: backends.cudnn.benchmark)]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, 'fp32_precision'),
                    reason='PyTorch has the old interface only')
@pytest.mark.parametrize('setting', [
    lambda: setattr(torch.backends.cuda.matmul, 'fp32_precision', 'tf32'),
    lambda: torch.set_float32_matmul_precision('medium'),
    lambda: setattr(torch.backends.cuda.matmul, 'allow_tf32', True)],
    ids=['the new interface', 'set_float32_matmul_precision', 'allow_tf32'])
@pytest.mark.usefixtures('_settings_kept')
def test_settings_of_precision_are_left_as_they_were(setting):
    setting()
    settings = precision_settings()
    before = randomize(nn.Sequential(OREPAConv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    inside = []
    before.register_forward_hook(lambda *args: inside.append(
        torch.backends.cuda.matmul.fp32_precision))
    assert verify(before, reparameterize(before), torch.randn(2, 3, 16, 16)).passed
    assert set(inside) == {'ieee'}
    assert precision_settings() == settings


@pytest.mark.parametrize('spoil', [
    lambda model: delattr(model, 'aux'), lambda model: setattr(model, 'more', nn.Conv2d(1, 1, 1)),
    lambda model: setattr(model.aux, 'stride', (2, 2)), lambda model: setattr(model.aux_norm,
                                                                             'eps', 0.1)])
def test_another_network_is_not_passed_where_no_output_shows_it(spoil):
    """What no raw output reads: its tensors and how it is set up are compared all the same."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux = OREPAConv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.aux_norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.conv(x)

    before = randomize(Net()).eval()
    after = reparameterize(before)
    x = torch.randn(1, 3, 8, 8)
    assert verify(before, after, x).passed
    spoil(after)
    report = verify(before, after, x)
    assert not report.passed
    assert 'another network' in report.explain()
