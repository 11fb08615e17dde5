"""Run an end-to-end ONNX file in place of a model, and compare both."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compare import with_mask_probabilities
from .end2end_file import EndToEndFile
from .graphs import inputs_and_samples, prepared
from .report import BoxComparison, EndToEndReport


class EndToEndModel(EndToEndFile):
    """A model whose predictions an end-to-end file makes, for MMEngine's test loop.

    Images come from the model's own test pipeline, which resizes them.

    Args:
        model: The model that was exported; left as it is.
        path: The file that `export_end2end` wrote, with pixels as input.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no such file.
    """

    def __init__(self, model: nn.Module, path: str | Path) -> None:
        super().__init__(path, model.data_preprocessor)
        #: Images that were smaller or larger than the input of the file.
        self.other_size = 0

    def forward(self, inputs: Tensor, data_samples: list, mode: str = 'predict') -> list[Any]:
        """Predictions on images that the data preprocessor gave.

        Args:
            inputs: `(N, 3, h, w)`.
            data_samples: Of the images, filled in place.
            mode: `predict`, which is all that such a file does.
        """
        return self.filled(self.outputs(inputs, data_samples), data_samples)

    def outputs(self, inputs: Tensor, samples: list) -> dict[str, Tensor]:
        """What the file says.

        Args:
            inputs: Images as the data preprocessor gives them, `(N, 3, h, w)`.
            samples: Their data samples.
        """
        inputs, sizes = self.on_canvas(inputs.float().cpu(), samples)
        mean, std = ((self.data_preprocessor.mean.cpu(), self.data_preprocessor.std.cpu())
                     if getattr(self.data_preprocessor, '_enable_normalize', False) else (0.0, 1.0))
        pixels = (inputs * std + mean).round().clamp(0, 255).to(torch.uint8)
        return self.run(pixels.permute(0, 2, 3, 1), sizes)

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
    model = with_mask_probabilities(prepared(model))
    file = EndToEndModel(model, path)
    report = EndToEndReport(file.task, BoxComparison() if file.task == 'detection' else None)
    pairs = [inputs_and_samples(batch) for batch in batches]
    pairs += [(inputs[:1], samples[:1]) for inputs, samples in pairs[:1] if len(inputs) > 1]
    for inputs, samples in pairs:
        if inputs.shape[2] > file.height or inputs.shape[3] > file.width:
            continue
        report.images += len(inputs)
        found = file.outputs(inputs, samples)
        inputs, _ = file.on_canvas(inputs, samples)
        if file.task == 'detection':
            cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg
            expected = model.predict(inputs, copy.deepcopy(samples), rescale=False)
            for one, other in zip(expected, file.instances(found, samples, False, -1)):
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
