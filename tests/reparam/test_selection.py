"""What a model draws at random or selects by score is the same in both forms."""

import pytest
import torch
from helpers import randomize, relative_error
from torch import nn

from orepa_mm.layers import OREPAConv2d
from orepa_mm.reparam import reparameterize, verify
from orepa_mm.reparam.selection import SameSelection


def model():
    return randomize(nn.Sequential(
        OREPAConv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        OREPAConv2d(8, 4, 3, padding=1)))


def images():
    return torch.randn(2, 3, 16, 16)


class RandomHead(nn.Module):
    """As SegNeXt's: it draws where it starts its search, in evaluation too."""

    def forward(self, x):
        return x * torch.rand(x.shape[1:], dtype=x.dtype, device=x.device)


def test_what_draws_random_numbers_gets_the_same():
    before = nn.Sequential(model(), RandomHead()).eval()
    assert verify(before, reparameterize(before), images()).complete


class Selects(nn.Module):
    """As the queries of a DETR in two stages: all that follows depends on the order of scores."""

    def __init__(self, slope=1e-6):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        x = x.flatten(1)
        places = torch.topk(1 + self.slope * x, 50, dim=1)[1]
        return x.gather(1, places)


@pytest.mark.parametrize(('slope', 'passed'), [(-1e-6, True), (0.1, False)])
def test_what_is_selected_is_the_same_in_both_forms(slope, passed):
    """Scores that are alike may come in another order; scores that differ are seen."""
    before, after = nn.Sequential(model(), Selects()), nn.Sequential(model(), Selects(slope))
    after.load_state_dict(before.state_dict())
    after = reparameterize(after.eval())
    x = images()
    assert relative_error(after(x), before.eval()(x)) > 1e-4 or slope > 0
    report = verify(before, after, x)
    assert all(error.passed for error in report.errors if error.dtype == 'float32') == passed
    assert any(error.name == 'selected from[0]' for error in report.errors)


def test_what_a_selection_leaves_alone():
    """Other candidates, results that are written elsewhere, scores that are written over."""
    scores = torch.tensor([1.0, 3.0, 2.0])
    with SameSelection() as before:
        torch.topk(scores, 1)
        scores.topk(2)
        scores.fill_(0)
    assert [noted.tolist() for noted in before.scores] == [[1, 3, 2]] * 2
    with SameSelection(before):
        assert torch.topk(torch.tensor([9.0, 3.0]), 1).indices.tolist() == [0]
        values, indices = torch.topk(torch.tensor([9.0, 3.0, 5.0]), 2)
        assert (values.tolist(), indices.tolist()) == ([3, 5], [1, 2])
        out = torch.empty(1), torch.empty(1, dtype=torch.int64)
        torch.topk(torch.tensor([9.0, 3.0, 5.0]), 1, out=out)
        assert out[1].tolist() == [0]
