"""Run an end-to-end ONNX file in place of a model, and compare both."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compare import Session, shallow_copy
from .end2end import task_of
from .graphs import inputs_and_samples, prepared
from .report import BoxComparison, EndToEndReport


class EndToEndModel(nn.Module):
    """A model whose predictions an end-to-end file makes, for MMEngine's test loop.

    Args:
        model: The model that was exported; left as it is.
        path: The file that `export_end2end` wrote, with pixels as input.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, model: nn.Module, path: str | Path) -> None:
        super().__init__()
        self.task, self.data_preprocessor = task_of(model), model.data_preprocessor
        self.mask_head = None
        if self.task == 'detection' and hasattr(model, 'roi_head') and model.roi_head.with_mask:
            # its masks are activated, and of the box's label
            self.mask_head = shallow_copy(model.roi_head.mask_head)
            self.mask_head.class_agnostic = True
            self.mask_cfg = model.roi_head.test_cfg
        self.session = Session(Path(path))
        self.height, self.width = self.session.session.get_inputs()[0].shape[1:3]
        #: Images that were smaller or larger than the input of the file.
        self.other_size = 0

    def test_step(self, data: Mapping[str, Any]) -> list[Any]:
        """Predictions on what a data loader of a detector or classifier gives.

        Args:
            data: One batch.
        """
        batch = self.data_preprocessor(data, False)
        inputs, samples = inputs_and_samples(batch)
        found = self(inputs, samples)
        if self.task == 'classification':
            for sample, scores in zip(samples, found['probabilities']):
                sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))
        else:
            for sample, instances in zip(samples, self.instances(found, samples, True)):
                sample.pred_instances = instances
        return samples

    def forward(self, inputs: Tensor, samples: list) -> dict[str, Tensor]:
        """What the file predicts.

        Args:
            inputs: Images as the data preprocessor gives them, `(N, 3, h, w)`.
            samples: Their data samples.

        Returns:
            The file's outputs.
        """
        inputs, sizes = self.on_canvas(inputs, samples)
        mean, std = ((self.data_preprocessor.mean, self.data_preprocessor.std)
                     if getattr(self.data_preprocessor, '_enable_normalize', False) else (0.0, 1.0))
        pixels = (inputs * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        feed = [pixels.contiguous()]
        return self.session(feed if self.task == 'classification' else [*feed, sizes])

    def on_canvas(self, inputs: Tensor, samples: list) -> tuple[Tensor, Tensor]:
        """Images in the size of the file's input, and height and width of each in it, `(N, 2)`.

        Args:
            inputs: Images as the data preprocessor gives them, `(N, 3, h, w)`.
            samples: Their data samples.
        """
        canvas = self.height, self.width
        sizes = torch.tensor([sample.metainfo.get('img_shape', canvas)[:2]
                              for sample in samples])
        self.other_size += len(inputs) * (tuple(inputs.shape[2:]) != canvas)
        # as MMDetection pads at the right and below
        inputs = F.pad(inputs, (0, max(0, self.width - inputs.shape[3]),
                                0, max(0, self.height - inputs.shape[2])))
        return (inputs[:, :, :self.height, :self.width].contiguous(),
                torch.minimum(sizes, torch.tensor(canvas)))

    def instances(self, found: Mapping[str, Tensor], samples: list, rescale: bool) -> list[Any]:
        """MMDetection's `InstanceData` of each image.

        Args:
            found: The file's outputs.
            samples: Of the images.
            rescale: Whether boxes are in pixels of the original image; else of the input.
        """
        from mmengine.structures import InstanceData

        results = []
        for image, sample in enumerate(samples):
            count = int(found['count'][image])
            boxes = found['boxes'][image, :count].clone()
            one = InstanceData(scores=found['scores'][image, :count],
                               labels=found['labels'][image, :count])
            if self.mask_head is not None:
                masks = found['masks'][image, :count, None]
                one.masks = self.mask_head._predict_by_feat_single(
                    masks.numpy(), boxes.clone(), one.labels, sample.metainfo, self.mask_cfg,
                    rescale, True) if count else torch.zeros(
                        0, *(sample.ori_shape if rescale else sample.img_shape)[:2],
                        dtype=torch.bool)
            if rescale:
                boxes /= boxes.new_tensor(sample.scale_factor).repeat(1, 2)
            one.bboxes = boxes
            results.append(one)
        return results


@torch.no_grad()
def compare_end2end(model: nn.Module, batches: Iterable[Mapping[str, Any]], path: str | Path
                    ) -> EndToEndReport:
    """Compare what an end-to-end file predicts on the CPU with the model's own `predict`.

    On each batch, and on the first image of the first alone.

    Args:
        model: The model that was exported; left as it is.
        batches: What the model's data preprocessor returns. Images that do not fit
            into the file's input are left out.
        path: The file that `export_end2end` wrote, with pixels as input.

    Returns:
        How the predictions differ.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    model = prepared(model)
    file = EndToEndModel(model, path)
    report = EndToEndReport(file.task, BoxComparison() if file.task == 'detection' else None)
    pairs = [inputs_and_samples(batch) for batch in batches]
    pairs += [(inputs[:1], samples[:1]) for inputs, samples in pairs[:1] if len(inputs) > 1]
    for inputs, samples in pairs:
        if inputs.shape[2] > file.height or inputs.shape[3] > file.width:
            continue
        report.images += len(inputs)
        found = file(inputs, samples)
        inputs, _ = file.on_canvas(inputs, samples)
        if file.task == 'detection':
            cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg
            expected = model.predict(inputs, copy.deepcopy(samples), rescale=False)
            for one, other in zip(expected, file.instances(found, samples, False)):
                report.boxes.add(one.pred_instances, other, cfg.get('score_thr', 0.0),
                                 cfg.get('max_per_img', 0))
        elif file.task == 'segmentation':
            metas = [{'img_shape': inputs.shape[2:]} for _ in samples]
            logits = model.encode_decode(inputs, metas)
            expected = (logits.argmax(1) if logits.shape[1] > 1
                        else (logits.sigmoid() > model.decode_head.threshold)[:, 0].long())
            report.pixels += expected.numel()
            report.pixel_flips += int((expected != found['label_map']).sum())
        else:
            expected = torch.stack([sample.pred_score for sample in model.predict(
                inputs, copy.deepcopy(samples))])
            report.probability_difference = max(report.probability_difference, float(
                (expected - found['probabilities']).abs().max().nan_to_num(float('inf'))))
    return report
