"""What a test does beside measuring: draw, write its predictions, augment its images."""

from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..errors import ConfigError
from ..files import written_whole

#: What merges the predictions on augmented images where a config does not say.
_FLIP_TTA = {
    'mmdet': dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5),
                                                   max_per_img=100)),
    'mmpretrain': dict(type='mmpretrain.AverageClsScoreTTA'),
}


def show_predictions(cfg: Config, show_dir: str | Path | None = None, show: bool = False,
                     wait_time: float = 2) -> None:
    """Let a test draw its predictions.

    Args:
        cfg: A config with a visualization hook; changed in place.
        show_dir: Folder to draw into.
        show: Whether to show them in a window.
        wait_time: Seconds per shown image.

    Raises:
        ConfigError: If the config has no visualization hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if not hook:
        raise ConfigError('to draw predictions, the config needs default_hooks.visualization, as '
                          'the stock configs have')
    scope = cfg.get('default_scope')
    hook['enable' if scope == 'mmpretrain' else 'draw'] = True
    if scope in ('mmpretrain', 'mmseg'):
        hook['interval'] = 1  # these count images, MMDetection draws every one
    if show:
        hook.update(show=True, wait_time=wait_time)
    if show_dir and scope == 'mmseg':
        cfg.visualizer.save_dir = str(show_dir)
    elif show_dir:
        hook['out_dir' if scope == 'mmpretrain' else 'test_out_dir'] = str(show_dir)


def with_tta(cfg: Config) -> Config:
    """The config of a test with test-time augmentation.

    Taken are `tta_model` and `tta_pipeline` of the config; a detector or
    classifier that has none is tested on each image and its mirror image.

    Args:
        cfg: From `load_config`; left as it is.

    Returns:
        A new config.

    Raises:
        ConfigError: If a segmentor's config has none (which scales to take
            depends on the data), or several data sets are joined.
    """
    cfg = copy.deepcopy(cfg)
    scope = cfg.get('default_scope')
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        raise ConfigError(f'--tta does not know where the pipeline of a {dataset.type} is: set '
                          'test_dataloader to a single data set')
    if scope in _FLIP_TTA:
        cfg.setdefault('tta_model', copy.deepcopy(_FLIP_TTA[scope]))
    if scope in _FLIP_TTA and 'tta_pipeline' not in cfg:
        *transforms, pack = copy.deepcopy(dataset.pipeline)
        if scope == 'mmdet':  # boxes are flipped back by what is noted here
            pack.meta_keys = (*pack.get('meta_keys', (
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
                'flip', 'flip_direction')
        cfg.tta_pipeline = [*transforms, dict(type='TestTimeAug', transforms=[
            [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)], [pack]])]
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise ConfigError(f'--tta needs {key} in the config, as the stock segmentation configs '
                              'have')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = {**cfg.tta_model, 'module': cfg.model}
    return cfg


def dump_predictions(runner: Runner, path: str | Path) -> None:
    """Let a test write its predictions as well, whole or not at all.

    Args:
        runner: From `build_test_runner`.
        path: The `.pkl` file to write.
    """
    if runner.cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults as DumpResults  # encodes masks
    else:
        from mmengine.evaluator import DumpResults

    class DumpWhole(DumpResults):
        def compute_metrics(self, results: list) -> dict:
            with written_whole(path) as temporary:
                dump(results, str(temporary))
            print_log(f'wrote the predictions to {path}', 'current')
            return {}

    runner.test_evaluator.metrics.append(DumpWhole(out_file_path=str(path)))
