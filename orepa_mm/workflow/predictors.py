"""Over the toolboxes' inferencers: images in; drawings, and files that other programs read, out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from torch import nn

from ..errors import ConfigError
from .pictures import Picture


class Predictor(ABC):
    """What a task writes of its predictions; `add` for each image, then `finish`.

    Args:
        model: From `load_model` or `load_onnx`, of this task's toolbox.
        folder: To write into.
        draw: Whether to draw predictions, into `vis`.
    """

    #: Module and name of the toolbox's inferencer, and what draws.
    inferencer: tuple[str, str]
    visualizer: dict[str, Any]

    def __init__(self, model: nn.Module, folder: Path, draw: bool) -> None:
        self.folder, self.draw = folder, draw
        self.classes = list(model.dataset_meta.get('classes') or [])
        self._inferencer = self._build(model)

    def predict(self, pixels: Sequence[np.ndarray]) -> list[Any]:
        """The model's predictions on one batch.

        Args:
            pixels: Images of the same shape, (H, W, 3), blue, green, red.

        Returns:
            The toolbox's data sample of each image, on the CPU.
        """
        batch, = self._inferencer.preprocess(list(pixels), batch_size=len(pixels))
        data = batch if isinstance(batch, dict) else batch[1]  # MMDetection's has the images too
        return [sample.cpu() for sample in self._inferencer.forward(data)]

    def add(self, picture: Picture, sample: Any) -> None:
        """Write what was predicted on an image, and draw it.

        Args:
            picture: The image.
            sample: From `predict`.

        Raises:
            ConfigError: If the model predicts something else than this task has.
        """
        self._add(picture, sample)
        if self.draw:
            self._draw(picture, sample, self._file(picture, 'vis', '.jpg'))

    @abstractmethod
    def finish(self) -> None:
        """Write what is about all images."""

    @abstractmethod
    def _add(self, picture: Picture, sample: Any) -> None: ...

    @abstractmethod
    def _draw(self, picture: Picture, sample: Any, file: Path) -> None: ...

    def _build(self, model: nn.Module) -> Any:
        """The toolbox's inferencer, around a model that is loaded already."""
        module, name = self.inferencer

        class Loaded(getattr(import_module(module), name)):
            def _init_model(self, *args: Any) -> nn.Module:
                return model  # its own would load with warnings in place of errors

        cfg = model.cfg.copy()
        cfg.visualizer = dict(self.visualizer)  # no backend of the training run
        parameter = next(model.parameters(), None)  # ONNX files have none, and run on the CPU
        inferencer = Loaded(cfg, device='cpu' if parameter is None else str(parameter.device))
        # toolboxes fall back on the palette of another data set where classes are the user's own
        palette = model.dataset_meta.get('palette') or _palette(len(self.classes))
        if not isinstance(palette, str):
            palette = [tuple(colour) for colour in palette]  # MMEngine takes no lists
        inferencer.visualizer.dataset_meta = {'classes': self.classes, 'palette': palette}
        return inferencer

    def _file(self, picture: Picture, kind: str, suffix: str) -> Path:
        path = self.folder / kind / f'{picture.name}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    def _write(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(json.dumps(content))


class DetectionPredictor(Predictor):
    """Boxes and masks: `predictions.json` in COCO's result format, and `images.json`.

    `images.json` has the images and categories of a COCO annotation file, and
    no annotations. Categories are counted from 1 in the order of the classes;
    both files name them, as other data sets may count otherwise.

    Args:
        model: As of `Predictor`.
        folder: As of `Predictor`.
        draw: As of `Predictor`.
        score_thr: Detections whose score is not above it are left out.
    """

    inferencer = 'mmdet.apis', 'DetInferencer'
    visualizer = {'type': 'DetLocalVisualizer'}

    def __init__(self, model: nn.Module, folder: Path, draw: bool, score_thr: float) -> None:
        super().__init__(model, folder, draw)
        self.score_thr = score_thr
        self.images: list[dict] = []
        self.found: list[dict] = []

    def _add(self, picture: Picture, sample: Any) -> None:
        if 'pred_instances' not in sample:
            raise ConfigError('the model predicts no boxes or masks of objects: panoptic '
                              'segmentation is not supported')
        number = len(self.images) + 1
        height, width = picture.pixels.shape[:2]
        self.images.append({'id': number, 'file_name': picture.file_name, 'height': height,
                            'width': width})
        found = self._inferencer.pred2dict(sample)
        masks = found.get('masks') or [None] * len(found['labels'])
        for label, score, box, mask in zip(found['labels'], found['scores'], found['bboxes'],
                                           masks):
            if score > self.score_thr:  # as what draws compares
                left, top, right, bottom = box
                self.found.append({
                    'image_id': number, 'file_name': picture.file_name,
                    'category_id': label + 1, 'category_name': self._name(label),
                    'bbox': [left, top, right - left, bottom - top], 'score': score,
                    **({} if mask is None else {'segmentation': mask})})

    def _draw(self, picture: Picture, sample: Any, file: Path) -> None:
        self._inferencer.visualizer.add_datasample(
            picture.name, picture.rgb, sample, draw_gt=False, pred_score_thr=self.score_thr,
            out_file=str(file))

    def finish(self) -> None:
        """Write both JSON files."""
        self._write('images.json', {
            'images': self.images, 'annotations': [],
            'categories': [{'id': i, 'name': name} for i, name in enumerate(self.classes, 1)]})
        self._write('predictions.json', self.found)


class SegmentationPredictor(Predictor):
    """Label maps: PNG files in `labels`, and `predictions.json`, which names files and classes.

    Each pixel of a label map, as large as its image, is the index of a class.

    Args:
        model: As of `Predictor`.
        folder: As of `Predictor`.
        draw: As of `Predictor`.
    """

    inferencer = 'mmseg.apis', 'MMSegInferencer'
    visualizer = {'type': 'SegLocalVisualizer', 'alpha': 0.5}  # the image stays visible

    def __init__(self, model: nn.Module, folder: Path, draw: bool) -> None:
        super().__init__(model, folder, draw)
        self.images: list[dict] = []

    def _add(self, picture: Picture, sample: Any) -> None:
        if 'pred_sem_seg' not in sample:
            raise ConfigError('the model predicts no label maps: depth maps are not supported')
        file = self._file(picture, 'labels', '.png')
        labels = sample.pred_sem_seg.data[0].numpy()
        mmcv.imwrite(labels.astype(np.uint8 if labels.max() < 256 else np.uint16), str(file))
        self.images.append({'file_name': picture.file_name,
                            'labels': file.relative_to(self.folder).as_posix()})

    def _draw(self, picture: Picture, sample: Any, file: Path) -> None:
        self._inferencer.visualizer.add_datasample(
            picture.name, picture.rgb, sample, draw_gt=False, out_file=str(file))

    def finish(self) -> None:
        """Write the JSON file."""
        self._write('predictions.json', {'classes': self.classes, 'images': self.images})


class ClassificationPredictor(Predictor):
    """Classes: `predictions.json` with the best of each image, the best first.

    Args:
        model: As of `Predictor`.
        folder: As of `Predictor`.
        draw: As of `Predictor`.
        top_k: How many of each image.
    """

    inferencer = 'mmpretrain.apis', 'ImageClassificationInferencer'

    def __init__(self, model: nn.Module, folder: Path, draw: bool, top_k: int) -> None:
        super().__init__(model, folder, draw)
        self.top_k = top_k
        self.images: list[dict] = []

    def _build(self, model: nn.Module) -> Any:
        module, name = self.inferencer
        inferencer = getattr(import_module(module), name)(model)  # it takes a loaded model
        inferencer.visualizer = import_module('mmpretrain.visualization').UniversalVisualizer()
        return inferencer

    def _add(self, picture: Picture, sample: Any) -> None:
        if 'pred_score' not in sample:
            raise ConfigError('the model predicts no scores of classes')
        best = sample.pred_score.topk(min(self.top_k, len(sample.pred_score)))
        self.images.append({'file_name': picture.file_name, 'top': [
            {'label': label, 'class': self._name(label), 'score': score}
            for label, score in zip(best.indices.tolist(), best.values.tolist())]})

    def _draw(self, picture: Picture, sample: Any, file: Path) -> None:
        self._inferencer.visualizer.visualize_cls(
            picture.rgb, sample, classes=self.classes or None, draw_gt=False, name=picture.name,
            out_file=str(file))

    def finish(self) -> None:
        """Write the JSON file."""
        self._write('predictions.json', self.images)


def _palette(count: int) -> list[list[int]]:
    """As many colours, (3,) each of 0 to 255, the same at every call."""
    return np.random.default_rng(42).integers(0, 256, (count, 3)).tolist()
