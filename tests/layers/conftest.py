import pytest
import torch
from helpers import DEVICES, LAYERS, randomize

from orepa_mm.layers import OREPARepVGGOnlineConv2d

EVERY_LAYER = {
    **LAYERS,
    'online kxk of RepVGG, grouped': lambda: OREPARepVGGOnlineConv2d(4, 4, 3, padding=1, groups=2),
}


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    """What a test creates lies there, unless it says otherwise."""
    with torch.device(request.param):
        yield torch.device(request.param)


@pytest.fixture(params=EVERY_LAYER)
def layer(request, device):
    return randomize(EVERY_LAYER[request.param]())


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 16, 12)
