"""What a config starts from: a missing file is noticed before the data are read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from ..checkpoints import pretrained_cfgs

#: Plain ImageNet weights of a backbone, by type and depth.
_PLAIN_WEIGHTS = {
    **{('OREPAResNet', depth): f'torchvision://resnet{depth}' for depth in (18, 34, 50, 101, 152)},
    ('OREPAResNeXt', 50): 'torchvision://resnext50_32x4d',
}


def check_pretrained(cfg: Config) -> None:
    """Fail before the data are read if a file of pretrained weights is missing.

    Args:
        cfg: A training config.

    Raises:
        FileNotFoundError: It says where the file comes from, and how to do without.
    """
    for where, name, part, init_cfg in _init_cfgs(cfg.model, 'model'):
        path = init_cfg.get('checkpoint') or ''
        if not path or '://' in path:
            continue
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(
                f'{where}.{name} asks for the pretrained weights {path}, which is no file.\n'
                + _ways_on(path, where, name, part))


def _ways_on(path: str, where: str, init_cfg: str, part: dict) -> str:
    """What to do if a file of pretrained weights is missing.

    Args:
        path: The file.
        where: The part of the model that it is for, e.g. `model.backbone`.
        init_cfg: What asks for it there, e.g. `init_cfg.0`.
        part: Its config.
    """
    name, ways = str(part.get('type')).rpartition('.')[2], []
    if name.startswith('OREPA'):
        ways.append('make it from a checkpoint of the OREPA authors with\n'
                    '  mim run orepa_mm convert_checkpoint AUTHORS_FILE ' + shlex.quote(path))
    if name.startswith(('OREPA', 'DBB')):
        ways.append('give one that you trained with a config of configs/imagenet')
    if name not in ('DBBResNet', 'DBBResNetV1c', 'OREPARepVGG'):  # BN in their branches
        plain = _PLAIN_WEIGHTS.get((name, part.get('depth')), 'PLAIN_FILE_OR_ADDRESS')
        ways.append('start from plain weights with\n  --cfg-options '
                    f'{where}.{init_cfg}.checkpoint={plain} {where}.{init_cfg}.prefix=None')
    scratch = [f'{where}.init_cfg=None', *(
        f'{where}.{option}={value}' for option, value in (
            ('frozen_stages', -1), ('norm_eval', False)) if option in part)]
    ways.append(f'train from scratch with\n  --cfg-options {" ".join(scratch)}')
    return 'Either ' + ',\nor '.join(ways)


def _init_cfgs(value: object, where: str) -> Iterator[tuple[str, str, dict, dict]]:
    """Whatever loads weights: name of the part, of its `init_cfg`, and the configs of both."""
    if isinstance(value, dict):
        given = value.get('init_cfg')
        for number, init_cfg in enumerate([given] if isinstance(given, dict) else given or ()):
            for found in pretrained_cfgs(init_cfg):
                name = 'init_cfg' if isinstance(given, dict) else f'init_cfg.{number}'
                yield where, name, value, found
        for key, item in value.items():
            if key != 'init_cfg':
                yield from _init_cfgs(item, f'{where}.{key}')
