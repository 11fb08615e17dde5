import pytest
import torch
from helpers import DEVICES


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    """What a test creates lies there, unless it says otherwise."""
    with torch.device(request.param):
        yield torch.device(request.param)
