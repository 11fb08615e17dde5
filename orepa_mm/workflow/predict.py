"""Predict with a model on images and videos of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope
from rich.console import Console
from rich.progress import track
from torch import nn

from ..errors import ConfigError
from ..files import folder_written_whole
from .pictures import Picture, find_sources, read_pictures
from .predictors import (
    ClassificationPredictor,
    DetectionPredictor,
    Predictor,
    SegmentationPredictor,
)


@dataclass(frozen=True)
class Predictions:
    """What `predict` did.

    Attributes:
        folder: What was written.
        count: Images and frames that were predicted on.
        skipped: A line for each file that could not be read, whole or in part.
    """

    folder: Path
    count: int
    skipped: tuple[str, ...]


def predict(model: nn.Module, inputs: Sequence[str | Path], out: str | Path, *,
            batch_size: int = 1, score_thr: float = 0.3, top_k: int = 5, draw: bool = True
            ) -> Predictions:
    """Predict on images and videos, through the inferencer of the model's toolbox.

    Writes a folder, whole or not at all: `vis`, where predictions are drawn,
    and `predictions.json`, see `DetectionPredictor`, `SegmentationPredictor`
    and `ClassificationPredictor`, which say what else there is. What cannot be
    read is skipped. Images of a batch have the same size, so that no image's
    predictions depend on others.

    Args:
        model: From `orepa_mm.load`, `load_model` or `load_onnx`.
        inputs: See `find_sources`.
        out: The folder to write; there is none yet, or an empty one.
        batch_size: Images that the model gets at once.
        score_thr: Detections whose score is not above it are neither drawn nor written.
        top_k: Classes that a classifier names of each image.
        draw: Whether to draw.

    Returns:
        What was written, and what was skipped.

    Raises:
        FileNotFoundError: If an input stands for no file.
        FileExistsError: If the folder is not empty.
        OSError: If none of the images can be read; nothing is written.
        ConfigError: If the model's toolbox is none of these, its config has no
            test pipeline, or it predicts something else.
    """
    cfg, out = model.cfg, Path(out).expanduser()
    scope = cfg.get('default_scope')
    flag, backend = _how_to_read(cfg)
    sources = find_sources(inputs)
    _require_free(out)
    skipped: list[str] = []
    count = 0
    with (folder_written_whole(out, lambda name: True) as folder,
          DefaultScope.overwrite_default_scope(scope)):
        predictor = _predictor(scope, model, folder, draw, score_thr, top_k)
        console = Console(stderr=True)
        pictures = track(read_pictures(sources, skipped, flag, backend), 'predicting',
                         total=sum(source.count for source in sources), console=console,
                         transient=True, disable=not console.is_terminal)
        for batch in _batches(pictures, batch_size):
            samples = predictor.predict([picture.pixels for picture in batch])
            for picture, sample in zip(batch, samples):
                predictor.add(picture, sample)
            count += len(batch)
        if not count:
            raise OSError('none of the images can be read:\n' + '\n'.join(skipped))
        predictor.finish()
        _require_free(out, but_for=folder)  # others may have come meanwhile
    return Predictions(out, count, tuple(skipped))


def _predictor(scope: str, model: nn.Module, folder: Path, draw: bool, score_thr: float,
               top_k: int) -> Predictor:
    if scope == 'mmdet':
        return DetectionPredictor(model, folder, draw, score_thr)
    if scope == 'mmseg':
        return SegmentationPredictor(model, folder, draw)
    if scope == 'mmpretrain':
        return ClassificationPredictor(model, folder, draw, top_k)
    raise ConfigError(f'the config has the default_scope {scope!r}: predictions are made by mmdet, '
                      'mmseg and mmpretrain')


def _how_to_read(cfg: Config) -> tuple[str, str | None]:
    """Flag and backend of `mmcv.imread`, as the test pipeline loads images."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    for step in dataset.get('pipeline') or ():
        if str(step['type']).rpartition('.')[2] == 'LoadImageFromFile':
            return step.get('color_type', 'color'), step.get('imdecode_backend')
    raise ConfigError('the config has no test_dataloader.dataset.pipeline that begins with '
                      'LoadImageFromFile: how images are prepared is not known')


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Lists of pictures of one shape, as many as asked for at most."""
    batch: list[Picture] = []
    for picture in pictures:
        if batch and (len(batch) >= size or picture.pixels.shape != batch[0].pixels.shape):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _require_free(out: Path, but_for: Path | None = None) -> None:
    if out.exists() and (not out.is_dir() or any(
            path.resolve() != but_for for path in out.iterdir())):
        raise FileExistsError(f'{out} exists already: nothing is overwritten')
