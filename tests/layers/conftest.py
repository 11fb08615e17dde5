import pytest
import torch
from helpers import LAYERS, randomize


@pytest.fixture(params=LAYERS)
def layer(request):
    return randomize(LAYERS[request.param]())


@pytest.fixture
def x():
    return torch.randn(2, 4, 16, 12)
