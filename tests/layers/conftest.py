import pytest
import torch
from helpers import DEVICES, LAYERS, randomize


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    """What a test creates lies there, unless it says otherwise."""
    with torch.device(request.param):
        yield torch.device(request.param)


@pytest.fixture(params=LAYERS)
def layer(request, device):
    return randomize(LAYERS[request.param]())


@pytest.fixture
def x(device):
    return torch.randn(2, 4, 16, 12)
