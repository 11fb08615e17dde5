"""torchvision's operators behind mmcv's names, against the compiled ones."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import needs_compiled
from mmcv import _ext as compiled
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

SOURCE = Path(__file__).parent.parent / 'requirements' / 'mmcv_ext.py'
spec = importlib.util.spec_from_file_location('mmcv_ext', SOURCE)
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)


def boxes_like(*shape, generator):
    corners = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat([corners, corners + torch.rand(*shape, 2, generator=generator) * 40], -1)


@needs_compiled
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
def test_nms(offset, threshold):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = boxes_like(300, generator=generator), torch.rand(300, generator=generator)
    kept = ours.nms(boxes, scores, threshold, offset)
    assert torch.equal(kept, compiled.nms(boxes, scores, iou_threshold=threshold, offset=offset))
    assert 0 < len(kept) < 300


def test_nms_counts_the_last_pixel_with_an_offset():
    """Computed by hand: 10 x 10 of 11 x 10 pixels against 9 x 10 of 10 x 10."""
    boxes = torch.tensor([[0., 0, 9, 9], [1, 0, 10, 9]])
    scores = torch.tensor([0.9, 0.8])
    assert len(ours.nms(boxes, scores, 0.81, 0)) == 2  # 8 * 9 / (2 * 81 - 72) = 0.80
    assert len(ours.nms(boxes, scores, 0.81, 1)) == 1  # 9 * 10 / (2 * 100 - 90) = 0.818


@needs_compiled
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align(aligned, sampling_ratio):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 25, 25, generator=generator)
    rois = torch.cat([torch.randint(0, 2, (7, 1), generator=generator).float(),
                      boxes_like(7, generator=generator)], 1)
    gradient = torch.randn(7, 3, 5, 6, generator=generator)
    kwargs = dict(aligned_height=5, aligned_width=6, spatial_scale=0.25,
                  sampling_ratio=sampling_ratio, pool_mode=1, aligned=aligned)
    results = []
    for module in (ours, compiled):
        output, backward, empty = torch.zeros(7, 3, 5, 6), torch.zeros_like(features), \
            torch.zeros(0)
        module.roi_align_forward(features, rois, output, empty, empty, **kwargs)
        module.roi_align_backward(gradient, rois, empty, empty, backward, **kwargs)
        results.append((output, backward))
    for mine, reference in zip(*results):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
        assert reference.abs().max() > 0.1


@pytest.mark.parametrize('gamma', [2.0, 1.5])
@pytest.mark.parametrize('alpha', [0.25, 0.6])
def test_focal_loss(gamma, alpha):
    """Against MMDetection's, which is differentiated by PyTorch; label 4 is background."""
    logits = (torch.randn(50, 4, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.arange(50) % 5
    one_hot = torch.nn.functional.one_hot(labels, 5)[:, :4]
    expected = py_sigmoid_focal_loss(logits, one_hot, gamma=gamma, alpha=alpha, reduction='none')
    expected.sum().backward()
    output, gradient, empty = torch.zeros(50, 4).double(), torch.zeros(50, 4).double(), \
        torch.zeros(0)
    ours.sigmoid_focal_loss_forward(logits.detach(), labels, empty, output, gamma, alpha)
    ours.sigmoid_focal_loss_backward(logits.detach(), labels, empty, gradient, gamma, alpha)
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_a_missing_operator_says_what_to_do():
    with pytest.raises(NotImplementedError, match='softnms needs the compiled operators'):
        ours.softnms(1, 2)
    with pytest.raises(NotImplementedError, match='MMCV=full'):
        ours.roi_align_forward(*[None] * 9, pool_mode=0, aligned=True)
    assert not hasattr(ours, '__path__')
