"""torchvision's operators behind mmcv's names, and mmcv's compiled ones where they are there."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from mmcv import _ext as installed
from mmcv.ops import ModulatedDeformConv2dPack
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

SOURCE = Path(__file__).parent.parent / 'requirements' / 'mmcv_ext.py'
spec = importlib.util.spec_from_file_location('mmcv_ext', SOURCE)
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
COMPILED = not hasattr(installed, 'OPERATORS')
BOTH = pytest.mark.parametrize('module', [ours, *([installed] if COMPILED else [])])


def boxes_like(*shape, generator):
    corners = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat([corners, corners + torch.rand(*shape, 2, generator=generator) * 40], -1)


def nms_one_by_one(boxes, scores, threshold, offset):
    """Take the best box, drop what overlaps it, and so on."""
    left, kept = scores.argsort(descending=True).tolist(), []

    def area(x1, y1, x2, y2):
        return max(x2 - x1 + offset, 0) * max(y2 - y1 + offset, 0)

    def overlap(one, other):
        both = area(max(one[0], other[0]), max(one[1], other[1]),
                    min(one[2], other[2]), min(one[3], other[3]))
        return both / (area(*one) + area(*other) - both)

    boxes = boxes.tolist()
    while left:
        kept.append(left.pop(0))
        left = [box for box in left if overlap(boxes[kept[-1]], boxes[box]) <= threshold]
    return kept


@BOTH
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
def test_nms(module, offset, threshold):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = boxes_like(300, generator=generator), torch.rand(300, generator=generator)
    kept = module.nms(boxes, scores, iou_threshold=threshold, offset=offset)
    assert kept.tolist() == nms_one_by_one(boxes, scores, threshold, offset)
    assert 0 < len(kept) < 300


def test_nms_counts_the_last_pixel_with_an_offset():
    """Computed by hand: 10 x 10 of 11 x 10 pixels against 9 x 10 of 10 x 10."""
    boxes = torch.tensor([[0., 0, 9, 9], [1, 0, 10, 9]])
    scores = torch.tensor([0.9, 0.8])
    assert len(ours.nms(boxes, scores, 0.81, 0)) == 2  # 8 * 9 / (2 * 81 - 72) = 0.80
    assert len(ours.nms(boxes, scores, 0.81, 1)) == 1  # 9 * 10 / (2 * 100 - 90) = 0.818


def sampled(channels, y, x):
    """`(c,)`: feature maps `(c, h, w)` at a point between their pixels; 0 a pixel outside."""
    height, width = channels.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return channels.new_zeros(len(channels))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, along = y - top, x - left
    return ((1 - down) * ((1 - along) * channels[:, top, left] + along * channels[:, top, right])
            + down * ((1 - along) * channels[:, bottom, left] + along * channels[:, bottom, right]))


def roi_align_point_by_point(features, rois, height, width, scale, sampling_ratio, aligned):
    """The mean of a grid of points in each bin, `(r, c, height, width)`."""
    shift, found = 0.5 if aligned else 0.0, []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - shift for corner in corners)
        tall, wide = y2 - y1, x2 - x1
        if not aligned:
            tall, wide = max(tall, 1.0), max(wide, 1.0)
        rows = sampling_ratio or math.ceil(tall / height)
        columns = sampling_ratio or math.ceil(wide / width)
        bins = [torch.stack([sampled(features[int(index)], y1 + (row + (i + 0.5) / rows)
                                     * tall / height, x1 + (column + (j + 0.5) / columns)
                                     * wide / width)
                             for i in range(rows) for j in range(columns)]).mean(0)
                for row in range(height) for column in range(width)]
        found.append(torch.stack(bins, 1).unflatten(1, (height, width)))
    return torch.stack(found)


@BOTH
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align(module, aligned, sampling_ratio):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 20, 20, generator=generator)
    rois = torch.cat([torch.randint(0, 2, (7, 1), generator=generator).float(),
                      boxes_like(7, generator=generator)], 1)
    gradient = torch.randn(7, 3, 5, 6, generator=generator)
    output, backward, empty = torch.zeros(7, 3, 5, 6), torch.zeros_like(features), torch.zeros(0)
    kwargs = dict(aligned_height=5, aligned_width=6, spatial_scale=0.25,
                  sampling_ratio=sampling_ratio, pool_mode=1, aligned=aligned)
    module.roi_align_forward(features, rois, output, empty, empty, **kwargs)
    module.roi_align_backward(gradient, rois, empty, empty, backward, **kwargs)
    exact = features.double().requires_grad_()
    expected = roi_align_point_by_point(exact, rois, 5, 6, 0.25, sampling_ratio, aligned)
    expected.backward(gradient.double())
    for found, wanted in ((output, expected.detach()), (backward, exact.grad)):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


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


@pytest.mark.skipif(COMPILED, reason='this mmcv has its compiled operators, deformable '
                    'convolutions among them')
def test_a_model_that_meets_a_missing_operator_says_what_to_do():
    layer = ModulatedDeformConv2dPack(2, 2, 3, padding=1)
    with pytest.raises(NotImplementedError, match=r'modulated_deform_conv_forward needs the '
                       r'compiled operators of mmcv.*make setup MMCV=full'):
        layer(torch.zeros(1, 2, 5, 5))
