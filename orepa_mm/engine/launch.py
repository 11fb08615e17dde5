"""From command-line arguments to a runner: what the tools share."""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.dist import broadcast_object_list, is_distributed, is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from torch import nn

from ..checkpoints import load_weights
from ..checkpoints.expansion import without_wrappers
from ..datasets import SPLITS, apply_data_root, require_usable_data
from ..errors import ConfigError
from .built_layers import log_built_layers
from .checkpoint_hook import use_whole_checkpoints
from .resume import checkpoint_folders, newest_checkpoint

#: What merges the predictions on augmented images where a config does not say.
_FLIP_TTA = {
    'mmdet': dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5),
                                                   max_per_img=100)),
    'mmpretrain': dict(type='mmpretrain.AverageClsScoreTTA'),
}
#: Plain ImageNet weights of a backbone, by type and depth.
_PLAIN_WEIGHTS = {
    **{('OREPAResNet', depth): f'torchvision://resnet{depth}' for depth in (18, 34, 50, 101, 152)},
    ('OREPAResNeXt', 50): 'torchvision://resnext50_32x4d',
}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which config to run, on which data, and how.

    Args:
        parser: The tool's parser; mmdet's names and meanings.
    """
    parser.add_argument('config', help='config file, or the name of one of orepa_mm')
    add = parser.add_argument
    add('--work-dir', help='folder for logs and results; work_dirs/<config name> by default')
    add('--data-root', help='folder in the layout of COCO, Cityscapes or ImageNet, as the config '
        'expects, to use instead of the one in the config; class names are read from it')
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=4 '
        'or key="[(a,b),(c,d)]"')
    add('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
        help='how the processes of a distributed run are started')
    # torch.distributed.launch passes --local-rank, older ones --local_rank
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace, splits: Sequence[str] = SPLITS,
                check: bool = True) -> Config:
    """Read the config that the arguments name, with everything they override.

    Args:
        args: Parsed arguments of `add_config_arguments`.
        splits: The data that will be read, of `train`, `val` and `test`.
        check: Whether data that make results wrong are refused.

    Returns:
        The config, its work folder set and its custom modules imported. Where it
        imports this package, checkpoints are written by `WholeCheckpointHook`.

    Raises:
        FileNotFoundError: If there is no such config file.
        DataRootError: See `apply_data_root` and `require_usable_data`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(find_config(args.config))
    cfg.launcher = args.launcher
    use_whole_checkpoints(cfg)  # before the options: they may ask for the stock hook
    options = args.cfg_options or {}
    cfg.merge_from_dict(options)
    if args.data_root is not None:
        apply_data_root(cfg, args.data_root, splits, check)
        cfg.merge_from_dict(options)  # what is asked for explicitly wins
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if check:
        require_usable_data(cfg, splits)
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return cfg


def find_config(name: str) -> Path:
    """Find a config file: a path, or the name of one of the package's own.

    Args:
        name: Path or bare file name, as `mim train` takes it.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    own = (Path(__file__).parent.parent / '.mim' / 'configs').resolve()
    found = sorted(own.rglob(name)) if Path(name).name == name else []
    if not found:
        raise FileNotFoundError(f'there is no config file {name}, and orepa_mm has none of that '
                                'name (`mim search orepa_mm` lists them)')
    return found[0]


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config; on the CPU, distributed runs work as well.

    The log says how many convolutions are re-parameterizable. A runner that is
    to resume without being told from where takes the newest whole checkpoint.

    Args:
        cfg: From `load_config`.

    Raises:
        CheckpointError: See `newest_checkpoint`.
    """
    if (cfg.get('randomness') or {}).get('deterministic'):
        # cuBLAS reads it when CUDA starts; without it PyTorch refuses to multiply matrices
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _prepare_cpu_processes(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    model = bare_model(runner)
    if isinstance(model, nn.Module):  # a FlexibleRunner builds it later
        log_built_layers(model, cfg.model)
    if cfg.get('resume') and not cfg.get('load_from'):
        path, problem = on_main_process(
            lambda: newest_checkpoint(runner.work_dir, checkpoint_folders(runner)))
        if problem:
            print_log(f'{problem}: going on from {path}, the newest whole checkpoint', 'current',
                      logging.WARNING)
        runner._load_from = path  # MMEngine would take what last_checkpoint names, unseen
    return runner


def build_test_runner(cfg: Config, checkpoint: str | Path) -> Runner:
    """Build a runner for testing whose model is loaded strictly.

    Args:
        cfg: From `load_config`.
        checkpoint: A local checkpoint file.

    Raises:
        CheckpointError: If the file does not belong to the config's model.
    """
    cfg.load_from = None
    cfg.resume = False
    runner = build_runner(cfg)
    model = bare_model(runner)
    checkpoint = load_weights(model, checkpoint)
    dataset_meta = checkpoint.get('meta', {}).get('dataset_meta')
    if dataset_meta is not None:
        model.dataset_meta = dataset_meta
    # Not through the runner: it would load again, and warn instead of failing.
    runner._has_loaded = True
    return runner


def bare_model(runner: Runner) -> nn.Module:
    """The runner's model, without the wrappers of a distributed run and of augmentation.

    Args:
        runner: Any runner.
    """
    return without_wrappers(runner.model)


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call a function in the main process; every process gets its result, or its error.

    Args:
        function: Its result must be small and picklable.
    """
    outcome: list = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except Exception as error:
            if not is_distributed():
                raise
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


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


def dump_predictions(runner: Runner, path: str) -> None:
    """Let a test write its predictions as well.

    Args:
        runner: From `build_test_runner`.
        path: The `.pkl` file to write.
    """
    if runner.cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults as DumpResults  # encodes masks
    else:
        from mmengine.evaluator import DumpResults
    runner.test_evaluator.metrics.append(DumpResults(out_file_path=path))


def check_pretrained(cfg: Config) -> None:
    """Fail before the data are read if a file of pretrained weights is missing.

    Args:
        cfg: A training config.

    Raises:
        FileNotFoundError: It says where the file comes from, and how to do without.
    """
    for where, part, init_cfg in _init_cfgs(cfg.model, 'model'):
        path = init_cfg.get('checkpoint') or ''
        if init_cfg.get('type') != 'Pretrained' or not path or '://' in path:
            continue
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(
                f'{where}.init_cfg asks for the pretrained weights {path}, which is no file.\n'
                + _ways_on(path, where, part))


def _ways_on(path: str, where: str, part: dict) -> str:
    """What to do if a file of pretrained weights is missing.

    Args:
        path: The file.
        where: The part of the model that it is for, e.g. `model.backbone`.
        part: Its config.
    """
    name, ways = str(part.get('type')).rpartition('.')[2], []
    if name.startswith('OREPA'):
        ways.append('make it from a checkpoint of the OREPA authors with\n'
                    f'  mim run orepa_mm convert_checkpoint AUTHORS_FILE {path}')
    if name.startswith(('OREPA', 'DBB')):
        ways.append('give one that you trained with a config of configs/imagenet')
    if name not in ('DBBResNet', 'DBBResNetV1c', 'OREPARepVGG'):  # BN in their branches
        plain = _PLAIN_WEIGHTS.get((name, part.get('depth')), 'PLAIN_FILE_OR_ADDRESS')
        ways.append('start from plain weights with\n  --cfg-options '
                    f'{where}.init_cfg.checkpoint={plain} {where}.init_cfg.prefix=None')
    scratch = [f'{where}.init_cfg=None', *(
        f'{where}.{option}={value}' for option, value in (
            ('frozen_stages', -1), ('norm_eval', False)) if option in part)]
    ways.append(f'train from scratch with\n  --cfg-options {" ".join(scratch)}')
    return 'Either ' + ',\nor '.join(ways)


def _init_cfgs(value: object, where: str) -> Iterator[tuple[str, dict, dict]]:
    """Name of a part of the model, its config, and its `init_cfg`, for each that has one."""
    if isinstance(value, dict):
        found = value.get('init_cfg')
        for init_cfg in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(init_cfg, dict):
                yield where, value, init_cfg
        for key, item in value.items():
            if key != 'init_cfg':
                yield from _init_cfgs(item, f'{where}.{key}')


def _prepare_cpu_processes(cfg: Config) -> None:
    """Start gloo here: MMEngine's own way to it asks for a CUDA device."""
    if not torch.distributed.is_initialized() and 'RANK' in os.environ:
        torch.distributed.init_process_group('gloo')
    cfg.setdefault('model_wrapper_cfg', dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None))
