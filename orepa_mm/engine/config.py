"""From command-line arguments to a config."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

from ..datasets import SPLITS, apply_data_root, require_usable_data
from ..errors import ConfigError, explained
from .checkpoint_hook import use_whole_checkpoints
from .config_keys import require_known_keys

#: Functions of MMEngine that read one file of a config.
_READERS = ('_file2dict', '_is_lazy_import', '_parse_lazy_import')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which config to run, on which data, and how.

    Args:
        parser: The tool's parser; mmdet's names and meanings.
    """
    parser.add_argument('config', help='config file, or the name of one of orepa_mm')
    add = parser.add_argument
    add('--work-dir', help='folder for logs and results; work_dirs/<config name> by default')
    add('--data-root', help='folder in the layout of COCO (for detectors also in YOLO or Pascal '
        'VOC format), Cityscapes or ImageNet, as the config expects, to use instead of the one in '
        'the config; class names are read from it')
    add('--cfg-options', nargs='+', action=SettingsAction, metavar='KEY=VALUE',
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
        ConfigError: If it cannot be read, names no model, or an option does not fit
            it, see `require_known_keys`.
        DataRootError: See `apply_data_root` and `require_usable_data`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    use_whole_checkpoints(cfg)  # before the options: they may ask for the stock hook
    options = args.cfg_options or {}
    require_known_keys(cfg, options)
    _merge(cfg, options)
    if not isinstance(cfg.get('model'), dict):
        raise ConfigError(f'the config {args.config} has no model: give one of a whole run, with '
                          'model=dict(type=...)')
    if args.data_root is not None:
        apply_data_root(cfg, args.data_root, splits, check)
        _merge(cfg, options)  # what is asked for explicitly wins
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


def read_config(name: str | Path) -> Config:
    """Read a config file.

    Args:
        name: As of `find_config`.

    Raises:
        FileNotFoundError: See `find_config`.
        ConfigError: If it, or a config that it is based on, cannot be read; it names
            that file, the line and the fault.
        ImportError: If a module cannot be imported that it names.
    """
    path = find_config(name)
    try:
        return Config.fromfile(path)
    except ImportError:
        raise
    except Exception as error:  # it is code: its damage may show as anything
        raise ConfigError(_unreadable(path, error)) from error


def find_config(name: str | Path) -> Path:
    """Find a config file: a path, or the name of one of the package's own.

    Args:
        name: Path or bare file name, as `mim train` takes it.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    own = (Path(__file__).parent.parent / '.mim' / 'configs').resolve()
    found = sorted(own.rglob(name)) if name and Path(name).name == str(name) else []
    if str(name) and Path(name).is_dir():
        raise FileNotFoundError(f'the config {name} is a folder: give a file in it')
    if not found:
        raise FileNotFoundError(f'there is no config file {name}, and orepa_mm has none of that '
                                'name (`mim search orepa_mm` lists them)')
    return found[0]


class SettingsAction(DictAction):
    """MMEngine's action for `KEY=VALUE`; a word that is none is refused."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Sequence[str], option_string: str | None = None) -> None:
        """Take the words of one option.

        Args:
            parser: Who parses.
            namespace: Where the settings go.
            values: The words.
            option_string: The option.
        """
        for word in values:
            if not word.partition('=')[0] or '=' not in word:
                parser.error(f'{option_string} takes KEY=VALUE, got {word!r}')
        super().__call__(parser, namespace, values, option_string)

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """A value; text keeps its spaces, which MMEngine takes out of paths too."""
        found = DictAction._parse_iterable(val)
        return val.strip('\'"') if isinstance(found, str) else found


def _merge(cfg: Config, options: Mapping[str, Any]) -> None:
    """Override settings; an error of ours if they do not fit."""
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise ConfigError('--cfg-options do not fit the config: '
                          + explained(error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a config, in which of the files that it is made of."""
    files, line = [str(path)], getattr(error, 'lineno', None)
    for frame, number in traceback.walk_tb(error.__traceback__):
        name = frame.f_locals.get('filename')
        if frame.f_code.co_name in _READERS and isinstance(name, str):
            files.append(os.path.normpath(name))
        elif frame.f_code.co_filename == os.path.abspath(files[-1]):
            line = number
    files = list(dict.fromkeys(map(os.path.abspath, files)))
    if not Path(files[-1]).exists() and len(files) > 1:
        return (f'the config {files[-2]} cannot be read: its _base_ {files[-1]} is not there; '
                'correct the path')
    what = error.msg if isinstance(error, SyntaxError) else explained(error)
    if not isinstance(error, (SyntaxError, OSError)):
        what = f'{type(error).__name__}: {what}'
    return (f'the config {files[-1]} cannot be read' + (f', line {line}' if line else '')
            + f': {what}')
