"""mmcv's compiled operators that detectors need, from torchvision: nothing is compiled.

`make setup MMCV=lite` copies this file into an mmcv without operators, as
`mmcv/_ext.py`. mmcv's own Python code then calls these functions in place of
the compiled ones, on a CPU and on a GPU. NMS, RoIAlign and the focal loss are
there: what Faster and Mask R-CNN, RetinaNet, FCOS, RTMDet and the segmentors
use. Any other operator raises when it is called, and says so.
"""

import torch
from torchvision.ops import nms as _nms
from torchvision.ops import roi_align as _roi_align

#: How `orepa_mm.doctor` knows this file.
OPERATORS = ('nms', 'roi_align', 'sigmoid_focal_loss')


def nms(boxes, scores, iou_threshold, offset):
    """Indices `(k,)` of the boxes `(n, 4)` that stay, best first; see `mmcv.ops.nms`."""
    # with an offset, mmcv counts the last pixel as part of a box
    corners = boxes.new_tensor([0, 0, offset, offset]) if offset else 0
    return _nms(boxes + corners, scores, iou_threshold)


def roi_align_forward(input, rois, output, argmax_y, argmax_x, aligned_height, aligned_width,
                      spatial_scale, sampling_ratio, pool_mode, aligned):
    """Fill `output (r, c, aligned_height, aligned_width)` from `rois (r, 5)`."""
    _require_mean(pool_mode)
    output.copy_(_roi_align(input, rois, (aligned_height, aligned_width), spatial_scale,
                            sampling_ratio, aligned))


def roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, aligned_height,
                       aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned):
    """Fill `grad_input (n, c, h, w)` from `grad_output (r, c, aligned_height, ...)`."""
    _require_mean(pool_mode)
    # RoIAlign is linear: its gradient does not depend on what it was given
    with torch.enable_grad():
        source = torch.zeros_like(grad_input, requires_grad=True)
        output = _roi_align(source, rois, (aligned_height, aligned_width), spatial_scale,
                            sampling_ratio, aligned)
        grad_input.copy_(*torch.autograd.grad(output, source, grad_output))


def sigmoid_focal_loss_forward(input, target, weight, output, gamma, alpha):
    """Fill `output (n, c)` for logits `input (n, c)` and labels `target (n,)`; c is none."""
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma, alpha):
    """Fill `grad_input (n, c)` with the derivatives of each loss by its logit."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        losses = _focal_loss(logits, target, weight, gamma, alpha)
        grad_input.copy_(*torch.autograd.grad(losses.sum(), logits))


def _focal_loss(logits, labels, weight, gamma, alpha):
    classes = torch.arange(logits.size(1), device=logits.device)
    positive = labels[:, None] == classes
    p = logits.sigmoid()
    sure = torch.nn.functional.logsigmoid
    loss = torch.where(positive, -alpha * (1 - p) ** gamma * sure(logits),
                       -(1 - alpha) * p ** gamma * sure(-logits))
    if weight.numel():  # of the class that a row is labelled with
        loss = loss * weight[labels.clamp(max=logits.size(1) - 1)][:, None]
    return loss


def _require_mean(pool_mode):
    if pool_mode != 1:
        raise NotImplementedError('RoIAlign with pool_mode="max" needs the compiled operators of '
                                  'mmcv: make setup MMCV=full')


def __getattr__(name):
    """Let mmcv import what is not there; calling it is an error."""
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f'{name} needs the compiled operators of mmcv, and this mmcv '
                                  'has those of torchvision only: make setup MMCV=full')

    return missing
