"""Re-parameterizing any module: what changes, and what must not."""

import pytest
import torch
from helpers import randomize, relative_error
from torch import nn

from orepa_mm.layers import DBBConv2d, OREPAConv1x1, OREPAConv2d, OREPAStemConv2d
from orepa_mm.reparam import is_training_form, reparameterize


def model():
    return randomize(nn.Sequential(
        OREPAStemConv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        OREPAConv2d(8, 8, 3, padding=1), nn.Sequential(OREPAConv1x1(8, 4))))


def images():
    return torch.randn(2, 3, 16, 16)


def test_a_copy_is_converted_and_the_model_stays():
    before = model().eval()
    after = reparameterize(before)
    assert is_training_form(before)
    assert not is_training_form(after)
    assert [type(m) for m in after.modules() if not list(m.children())] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Conv2d]
    x = images()
    assert relative_error(after(x), before(x)) < 1e-5


def test_inplace():
    before = model()
    assert reparameterize(before, inplace=True) is before
    assert not is_training_form(before)


def test_the_root_module_is_converted():
    layer = randomize(OREPAConv2d(3, 4, 3))
    conv = reparameterize(layer, inplace=True)
    assert type(conv) is nn.Conv2d
    x = images()
    assert relative_error(conv(x), layer(x)) < 1e-5


class CalledFromAList(nn.Module):
    """A block that is registered in front of a BN, and called elsewhere as well."""

    def __init__(self):
        super().__init__()
        self.conv = DBBConv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.others = [self.conv]

    def forward(self, x):
        return self.norm(self.conv(x)) + self.others[0](x)


def test_a_layer_that_is_called_from_a_list_keeps_its_bias():
    before = randomize(CalledFromAList()).eval()
    x = torch.randn(1, 4, 8, 8)
    assert relative_error(reparameterize(before)(x), before(x)) < 1e-5


def test_a_second_time_does_nothing():
    for before in (model(), OREPAConv2d(3, 4, 3)):
        once = reparameterize(before)
        twice = reparameterize(once)
        assert twice is not once
        assert reparameterize(once, inplace=True) is once
        for key, value in once.state_dict().items():
            assert torch.equal(twice.state_dict()[key], value)


def test_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match='nothing to re-parameterize'):
        reparameterize(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_shared_layers_stay_shared():
    layer = randomize(OREPAConv2d(4, 4, 3, padding=1))
    shared = nn.Sequential(layer, nn.ReLU(), layer)
    shared.again = layer
    after = reparameterize(shared)
    assert after[0] is after[2]
    assert after[0] is after.again
    x = torch.randn(1, 4, 8, 8)
    assert relative_error(after[:3](x), shared[:3](x)) < 1e-5


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_mode_dtype_and_requires_grad_are_kept(training, dtype):
    before = model().to(dtype).train(training)
    before[3].requires_grad_(False)
    after = reparameterize(before)
    assert all(m.training is training for m in after.modules())
    assert all(p.dtype == dtype for p in after.parameters())
    assert not after[3].weight.requires_grad
    assert not after[3].bias.requires_grad
    assert after[0].weight.requires_grad
    assert after[0].weight.is_leaf


def test_memory_format_is_kept():
    after = reparameterize(model().to(memory_format=torch.channels_last))
    assert after[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not after[3].weight.is_contiguous()
