"""One ONNX file from the image to boxes, masks, label maps or probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OnnxExportError
from ...files import written_whole
from .export import (
    as_text,
    exported_graph,
    named_shapes,
    preprocessing_meta,
    require_exportable,
)
from .graphs import (
    inputs_and_samples,
    prepared,
    roi_features,
    selecting_stages,
)
from .selection import (
    dense_detections,
    require_plain_nms,
    roi_detections,
    translations,
)
from .traceable import make_traceable


@dataclass(frozen=True)
class EndToEndExport:
    """What `export_end2end` wrote.

    Attributes:
        file: The file.
        task: `detection`, `segmentation` or `classification`.
        inputs: Names and shapes of the inputs; a name stands for a dynamic size.
        outputs: Names and shapes of the outputs, likewise.
    """

    file: Path
    task: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, the file by its name."""
        return {**asdict(self), 'file': self.file.name}


class EndToEnd(nn.Module):
    """A deployed model from images to what it predicts, in operations of fixed sizes.

    Args:
        model: A detector, segmentor or classifier, in eval mode.
        normalize: Whether images are pixels, to be normalized here; else they are normalized.
        fill: Value of each channel, in pixels, around an image that is smaller than the
            input; None: the data preprocessor's padding, which is not normalized.

    Raises:
        OnnxExportError: If the model predicts in a way that is not known here.
    """

    def __init__(self, model: nn.Module, normalize: bool = True,
                 fill: Sequence[float] | None = None) -> None:
        super().__init__()
        self.task = task_of(model)
        self.model, self.normalize = model, normalize
        _require_known(self.task, model)
        preprocessor = model.data_preprocessor
        mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        if getattr(preprocessor, '_enable_normalize', False):
            mean, std = preprocessor.mean, preprocessor.std
        pad = getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0)) or 0
        filling = (torch.full((3, 1, 1), float(pad)) if fill is None
                   else (torch.tensor(fill).view(3, 1, 1) - mean) / std)
        for name, value in (('mean', mean), ('std', std), ('fill', filling)):
            self.register_buffer(name, value.detach().clone().float(), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Predict.

        Args:
            images: Pixels `(N, H, W, 3)` in 8 bits; or `(N, 3, H, W)`, normalized.
            sizes: Height and width of each image, `(N, 2)`; what lies to the right of it
                or below is replaced by the padding. Classifiers have none.

        Returns:
            Detectors: `boxes (N, K, 4)`, `scores (N, K)`, `labels (N, K)`, `count (N,)`,
            maybe `masks (N, K, h, w)`. Segmentors: `label_map (N, H, W)`.
            Classifiers: `probabilities (N, C)`.
        """
        inputs = images
        if self.normalize:
            inputs = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        if self.task == 'classification':
            return {'probabilities': self.model(inputs, None, mode='tensor').softmax(1)}
        rows = torch.arange(inputs.shape[2], device=inputs.device)[None, :, None]
        columns = torch.arange(inputs.shape[3], device=inputs.device)[None, None]
        inside = (rows < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
        inputs = torch.where(inside[:, None], inputs, self.fill)
        if self.task == 'segmentation':
            return {'label_map': self._label_map(inputs)}
        return self._detections(inputs, sizes)

    def _label_map(self, inputs: Tensor) -> Tensor:
        head = self.model.decode_head
        logits = F.interpolate(self.model(inputs, None, mode='tensor'), inputs.shape[2:],
                               mode='bilinear', align_corners=head.align_corners)
        if head.out_channels == 1:  # as mmseg's postprocess_result
            return (logits.sigmoid() > head.threshold)[:, 0].to(torch.int64)
        return logits.argmax(1)

    def _detections(self, inputs: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        model = self.model
        if selecting_stages(model) == 1:
            boxes, scores, labels = dense_detections(
                model.bbox_head, model.bbox_head(model.extract_feat(inputs)), sizes)
            found = {'boxes': boxes, 'scores': scores, 'labels': labels}
        else:
            features = model.extract_feat(inputs)
            boxes, scores, _ = dense_detections(model.rpn_head, model.rpn_head(features), sizes,
                                                apart_by_level=True)
            found = roi_detections(model.roi_head, roi_features(model, features), boxes, scores,
                                   sizes)
        valid = found['scores'] > 0
        return {**found, 'scores': found['scores'].clamp(min=0), 'count': valid.sum(1)}


class _Outputs(nn.Module):
    """The same with a tuple for a dictionary, as the exporter takes it."""

    def __init__(self, module: EndToEnd) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(*args).values())


def export_end2end(model: nn.Module, batch: Mapping[str, Any], path: str | Path, *,
                   meta: Mapping[str, Any] | None = None, normalize: bool = True,
                   fill: Sequence[float] | None = None) -> EndToEndExport:
    """Write a deployed model as one ONNX file: images to what it predicts.

    The number of images is dynamic, their size that of `batch`. Inputs and
    outputs are those of `EndToEnd`. The metadata say what the caller does:
    `channel_order` of the pixels, `task`, `classes`, `mask_threshold` of masks, and with
    `normalize` false `mean` and `std`; lists are JSON.

    Args:
        model: A detector, segmentor or classifier of OpenMMLab, re-parameterized; left
            as it is.
        batch: What the model's data preprocessor returns. Only its shape is used.
        path: The file to write.
        meta: Stored in the metadata as well; what is not text becomes JSON.
        normalize: See `EndToEnd`.
        fill: See `EndToEnd`.

    Returns:
        File, inputs and outputs.

    Raises:
        ImportError: See `require_onnx`.
        ValueError: If the model is in training form.
        OnnxExportError: If the model cannot be exported; nothing is written then.
    """
    require_exportable(model)
    import onnx

    path, model = Path(path), prepared(model)
    module = EndToEnd(model, normalize, fill).eval()
    make_traceable(model)
    height, width = inputs_and_samples(batch)[0].shape[2:]
    args: tuple[Tensor, ...] = (torch.zeros(2, height, width, 3, dtype=torch.uint8) if normalize
                                else torch.zeros(2, 3, height, width),)
    names = ['images' if normalize else 'inputs']
    if module.task != 'classification':
        args, names = (*args, torch.tensor([[height, width]] * 2)), [*names, 'sizes']
    with torch.no_grad():
        outputs = list(module(*args))
    proto = exported_graph(_Outputs(module), args, f'{type(model).__name__} with its selection',
                           names, outputs, (tuple({0: 'batch'} for _ in args),), translations())
    found = preprocessing_meta(model)
    if normalize:
        found = {key: value for key, value in found.items() if key not in ('mean', 'std')}
    if 'masks' in outputs:
        found['mask_threshold'] = str(model.roi_head.test_cfg.mask_thr_binary)
    onnx.helper.set_model_props(proto, {**found, 'graph': 'end2end', 'task': module.task,
                                        **as_text(meta or {})})
    if proto.ByteSize() >= 2**31:
        raise OnnxExportError('the weights take more than 2 GB, the limit of a single ONNX file')
    with written_whole(path) as temporary:
        onnx.save(proto, str(temporary))
    return EndToEndExport(path, module.task, named_shapes(proto.graph.input),
                          named_shapes(proto.graph.output))


def task_of(model: nn.Module) -> str:
    """What a model predicts.

    Args:
        model: Of any toolbox.

    Returns:
        `detection`, `segmentation` or `classification`.

    Raises:
        OnnxExportError: If it is none of them.
    """
    if selecting_stages(model):
        return 'detection'
    if isinstance(getattr(model, 'decode_head', None), nn.Module):
        return 'segmentation'
    if type(model).__name__ == 'ImageClassifier':
        return 'classification'
    raise OnnxExportError(f'{type(model).__name__}: from the image to the end go detectors of one '
                          'or two stages, segmentors (EncoderDecoder) and classifiers '
                          '(ImageClassifier)')


def _require_known(task: str, model: nn.Module) -> None:
    """Refuse whatever selects, decodes or activates by code of its own."""
    name = type(model).__name__
    if task == 'segmentation':
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise OnnxExportError(f'{name} predicts in a sliding window (test_cfg.mode): in one '
                                  'ONNX file it predicts on whole images only')
    elif task == 'classification':
        from mmpretrain.models.heads import ClsHead
        if type(model.head)._get_predictions is not ClsHead._get_predictions:
            raise OnnxExportError(f'{type(model.head).__name__}: of classifiers only heads with '
                                  'a softmax can be exported to the end')
    elif selecting_stages(model) == 1:
        from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
        _require_methods(model.bbox_head, BaseDenseHead)
        require_plain_nms(model.bbox_head.test_cfg.get('nms'), type(model.bbox_head).__name__)
    else:
        from mmdet.models.dense_heads import RPNHead
        from mmdet.models.roi_heads.bbox_heads import BBoxHead
        _require_methods(model.rpn_head, RPNHead)
        _require_methods(model.roi_head.bbox_head, BBoxHead, ('_predict_by_feat_single',))
        require_plain_nms(model.rpn_head.test_cfg.get('nms'), 'the RPN')
        require_plain_nms(model.roi_head.test_cfg.get('nms'), 'the second stage')
        if not model.roi_head.bbox_head.with_reg or model.roi_head.bbox_head.custom_cls_channels:
            raise OnnxExportError(f'{type(model.roi_head.bbox_head).__name__}: only heads with '
                                  'boxes and a softmax can be exported to the end')


def _require_methods(head: nn.Module, base: type, names: Sequence[str] = (
        'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')) -> None:
    """Refuse a head that does not select as the stock one."""
    own = [name for name in names if getattr(type(head), name) is not getattr(base, name)]
    if own or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise OnnxExportError(f'{type(head).__name__} selects boxes by code of its own '
                              f'({", ".join(own) or "custom classes"}): in one ONNX file there are '
                              f'heads that select as {base.__name__} does')
