"""What a detector selects of its network's outputs, as tensor operations of fixed sizes.

After MMDetection's `BaseDenseHead`, `RPNHead`, `BBoxHead` and `StandardRoIHead`: what these drop
is kept here with the score `DROPPED`, so that all images of a batch hold equally many candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OnnxExportError

#: The score of a candidate that is dropped; those of others are above 0.
DROPPED = -1.0
#: Settings of NMS whose meaning is known; `split_thr` changes the speed alone.
_NMS_SETTINGS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}


@torch.library.custom_op('orepa_mm::nms_keeps', mutates_args=())
def nms_keeps(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes of each image NMS keeps; the standard operator NonMaxSuppression in ONNX.

    Args:
        boxes: `(N, M, 4)`, x1, y1, x2, y2.
        scores: `(N, M)`; no box is kept whose score is not above 0.
        iou_threshold: A box that overlaps a better one by more is dropped.

    Returns:
        `(N, M)`, boolean.
    """
    from torchvision.ops import nms

    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image, (its_boxes, its_scores) in enumerate(zip(boxes, scores)):
        candidates = (its_scores > 0).nonzero()[:, 0]
        kept[image, candidates[nms(its_boxes[candidates], its_scores[candidates],
                                   iou_threshold)]] = True
    return kept


@nms_keeps.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def translations() -> dict[Callable, Callable]:
    """How PyTorch's exporter writes the operators of this file, for `custom_translation_table`."""
    from onnx import TensorProto
    from onnxscript import opset18 as op

    def keeps(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        number = op.Gather(op.Shape(scores), op.Constant(value_ints=[1]))
        chosen = op.NonMaxSuppression(
            boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), number,
            op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0]))
        where = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # image and box
        ones = op.Expand(op.Constant(value_floats=[1.0]),
                         op.Gather(op.Shape(chosen), op.Constant(value_ints=[0])))
        none = op.Mul(scores, op.Constant(value_float=0.0))
        return op.Cast(op.ScatterND(none, where, ones), to=TensorProto.BOOL)

    return {torch.ops.orepa_mm.nms_keeps.default: keeps}


def require_plain_nms(cfg: Mapping[str, Any] | None, where: str) -> Mapping[str, Any]:
    """The settings of NMS, if it is the greedy one.

    Args:
        cfg: Of `test_cfg`.
        where: What it belongs to, for the message.

    Raises:
        OnnxExportError: If it is another.
    """
    if cfg is None or cfg.get('type', 'nms') != 'nms' or set(cfg) - _NMS_SETTINGS:
        raise OnnxExportError(f'{where} selects boxes by {dict(cfg) if cfg else "no NMS"}: in one '
                              'ONNX file there is greedy NMS (type="nms", iou_threshold) only')
    return cfg


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes whose corners lie in their image.

    Args:
        boxes: `(N, M, 4)`, x1, y1, x2, y2.
        sizes: Height and width of each image, `(N, 2)`.
    """
    limits = sizes.flip(1).repeat(1, 2).to(boxes)[:, None]
    return torch.minimum(boxes.clamp(min=0), limits)


def best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The best of each image, the best first.

    Args:
        scores: `(N, M)`.
        number: How many, if there are so many; not positive: all.

    Returns:
        Scores and places, `(N, K)` each.
    """
    total = scores.shape[1]
    scores, places = scores.topk(min(number, total) if number > 0 else total, dim=1)
    return scores, places


def taken(values: Tensor, places: Tensor) -> Tensor:
    """What lies at some places of each image.

    Args:
        values: `(N, M, ...)`.
        places: `(N, K)`, counted from 0.

    Returns:
        `(N, K, ...)`.
    """
    more = values.shape[2:]
    return values.gather(1, places.reshape(*places.shape, *[1] * len(more)).expand(-1, -1, *more))


def after_nms(boxes: Tensor, scores: Tensor, groups: Tensor, nms: Mapping[str, Any], number: int,
              min_size: float = -1) -> tuple[Tensor, Tensor, Tensor]:
    """What NMS keeps, the best first; as MMCV's `batched_nms`.

    Args:
        boxes: `(N, M, 4)`.
        scores: `(N, M)`, `DROPPED` where a candidate is none.
        groups: Integers `(N, M)`; boxes of different groups do not suppress each other.
        nms: `iou_threshold`, and `class_agnostic` if groups do not count.
        number: How many to keep at most.
        min_size: Boxes that are not wider and higher are dropped; negative: none is.

    Returns:
        `boxes (N, K, 4)`, `scores (N, K)` and `groups (N, K)`; 0, `DROPPED` and 0 where
        there are fewer.
    """
    if min_size >= 0:
        large = ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(-1)
        scores = torch.where(large, scores, DROPPED)
    apart = boxes
    if not nms.get('class_agnostic', False):
        valid = (scores > 0)[..., None]
        step = torch.where(valid, boxes, 0).amax((1, 2)) + 1
        apart = boxes + (groups.to(boxes) * step[:, None])[..., None]
    kept = nms_keeps(apart, scores, float(nms['iou_threshold']))
    scores, places = best(torch.where(kept, scores, DROPPED), number)
    found = scores > 0
    return (torch.where(found[..., None], taken(boxes, places), 0), scores,
            torch.where(found, taken(groups, places), 0))


def dense_detections(head: nn.Module, outputs: Sequence[Sequence[Tensor]], sizes: Tensor,
                     apart_by_level: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes that a dense head selects: a detector's final ones, or what an RPN proposes.

    Args:
        head: A head that selects as `BaseDenseHead` or `RPNHead` does.
        outputs: Of the head: scores, boxes, maybe factors of the scores, by level.
        sizes: Height and width of each image, `(N, 2)`.
        apart_by_level: Whether boxes of different levels do not suppress each other, as of
            an RPN; else those of different classes do not.

    Returns:
        As of `after_nms`; the groups are labels, or levels.
    """
    cfg, levels = head.test_cfg, []
    classes = head.cls_out_channels - (not head.use_sigmoid_cls)
    threshold = max(cfg.get('score_thr', 0), 0)
    for level, (priors, cls_score, bbox_pred, *factors) in enumerate(_levels(head, outputs)):
        scores = cls_score.sigmoid() if head.use_sigmoid_cls else cls_score.softmax(-1)[..., :-1]
        scores, places = best(scores.flatten(1), cfg.get('nms_pre', -1))
        scores = torch.where(scores > threshold, scores, DROPPED)
        where = torch.div(places, classes, rounding_mode='floor')
        if factors:
            factor = taken(factors[0], where)[..., 0].sigmoid()
            scores = torch.where(scores > 0, scores * factor, scores)
        boxes = _decoded(head, priors[where], taken(bbox_pred, where), sizes)
        groups = torch.full_like(places, level) if apart_by_level else places % classes
        levels.append((boxes, scores, groups))
    boxes, scores, groups = (torch.cat(parts, 1) for parts in zip(*levels))
    return after_nms(boxes, scores, groups, cfg.nms, cfg.max_per_img,
                     cfg.get('min_bbox_size', -1))


def roi_detections(roi_head: nn.Module, features: Sequence[Tensor], boxes: Tensor,
                   scores: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """The final boxes of a second stage, and masks if it has them.

    Args:
        roi_head: A `StandardRoIHead`.
        features: Those that it takes.
        boxes: Proposals, `(N, P, 4)`.
        scores: Of the proposals, `(N, P)`; not above 0: there is none.
        sizes: Height and width of each image, `(N, 2)`.

    Returns:
        `boxes (N, K, 4)`, `scores (N, K)`, `labels (N, K)`, maybe `masks (N, K, h, w)`.
    """
    head, cfg = roi_head.bbox_head, roi_head.test_cfg
    images, number = boxes.shape[:2]
    results = roi_head._bbox_forward(tuple(features), _rois(boxes))
    classes = head.num_classes
    regressed = 1 if head.reg_class_agnostic else classes
    decoded = head.bbox_coder.decode(
        boxes.reshape(-1, 4).repeat_interleave(regressed, dim=0),
        results['bbox_pred'].reshape(-1, 4), max_shape=None)
    decoded = decoded.reshape(images, number, regressed, 4).expand(images, number, classes, 4)
    decoded = decoded.reshape(images, number * classes, 4)
    if getattr(head.bbox_coder, 'clip_border', True):
        decoded = clipped(decoded, sizes)
    found = results['cls_score'].softmax(-1)[:, :-1].reshape(images, number, classes)
    found = torch.where((scores > 0)[..., None] & (found > max(cfg.score_thr, 0)), found, DROPPED)
    labels = torch.arange(classes, device=boxes.device).expand(images, number, classes)
    boxes, scores, labels = after_nms(decoded, found.flatten(1), labels.flatten(1), cfg.nms,
                                      cfg.max_per_img)
    detections = {'boxes': boxes, 'scores': scores, 'labels': labels}
    if roi_head.with_mask:
        masks = roi_head._mask_forward(tuple(features), _rois(boxes))['mask_preds']
        if not roi_head.mask_head.class_agnostic:
            index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, *masks.shape[2:])
            masks = masks.gather(1, index)
        detections['masks'] = masks.sigmoid().reshape(images, boxes.shape[1], *masks.shape[2:])
    return detections


def _rois(boxes: Tensor) -> Tensor:
    """`(N * P, 5)` of boxes `(N, P, 4)`: the number of the image before each."""
    number = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)
    return torch.cat([number[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2).reshape(-1, 5)


def _levels(head: nn.Module, outputs: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """By level: priors `(M, 2 or 4)`, and each output as `(N, M, C)`."""
    priors = head.prior_generator.grid_priors([level.shape[-2:] for level in outputs[0]],
                                              dtype=outputs[0][0].dtype,
                                              device=outputs[0][0].device)
    widths = [head.cls_out_channels, 4, 1]
    return [(prior, *(tensor.permute(0, 2, 3, 1).reshape(tensor.shape[0], prior.shape[0], width)
                      for tensor, width in zip(level, widths)))
            for prior, *level in zip(priors, *outputs)]


def _decoded(head: nn.Module, priors: Tensor, preds: Tensor, sizes: Tensor) -> Tensor:
    """Boxes `(N, M, 4)` of priors `(N, M, 2 or 4)` and what the head says `(N, M, 4)`."""
    boxes = head.bbox_coder.decode(priors.reshape(-1, priors.shape[-1]), preds.reshape(-1, 4),
                                   max_shape=None)
    boxes = getattr(boxes, 'tensor', boxes).reshape(preds.shape)
    return clipped(boxes, sizes) if getattr(head.bbox_coder, 'clip_border', True) else boxes
