"""Reading checkpoints for MMEngine, from wherever, safely.

`load_from`, `init_cfg`, resume, the inferencers and `mmengine.runner.load_checkpoint`
all end here. MMEngine reads what it downloads by PyTorch's hub, which runs code
that a file holds; and PyTorch compares no checksums, wherever a file lies.
"""

from __future__ import annotations

import http.client
import logging
import os
import posixpath
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from torch.hub import HASH_REGEX, download_url_to_file, get_dir

from ..errors import CheckpointError
from ..files import sha256
from .io import read_file


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a local checkpoint, as MMEngine's function of this name, but checked.

    Args:
        filename: The file; `~` is the home folder.
        map_location: As of `torch.load`.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or holds anything but tensors and the
            plain data of a runner's checkpoint. Only the environment variable
            `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1` lets PyTorch run its code.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{path} can not be found.')
    return read_file(path, map_location, weights_only=None)


def load_from_http(filename: str, map_location: Any = None, model_dir: str | None = None,
                   progress: bool = os.isatty(0)) -> Any:
    """Read a checkpoint from an address, as MMEngine's function of this name, but safely.

    It is downloaded once, by the first process, into the folder of PyTorch's
    hub, and read from there. If the file name ends with the beginning of its
    SHA-256 (`-19c8e357.pth`), a difference is warned of after the download: not
    all published files bear the right one, so MMEngine does not ask either.

    Args:
        filename: The address, http or https.
        map_location: As of `torch.load`.
        model_dir: Folder for the file; `checkpoints` in that of `torch.hub` by default.
        progress: Whether to show the progress of the download.

    Returns:
        What it holds.

    Raises:
        CheckpointError: If it cannot be downloaded, and as of `load_from_local`;
            it names the address.
    """
    rank, world_size = get_dist_info()
    if rank == 0:
        checkpoint = _download_and_read(filename, map_location, model_dir, progress)
    if world_size > 1:
        torch.distributed.barrier()
        if rank > 0:  # on another machine this downloads it there
            checkpoint = _download_and_read(filename, map_location, model_dir, progress)
    return checkpoint


def _download_and_read(address: str, map_location: Any, model_dir: str | None, progress: bool
                       ) -> Any:
    name = posixpath.basename(urlparse(address).path)
    if not name:
        raise CheckpointError(f'{address} names no file')
    path = Path(model_dir or Path(get_dir(), 'checkpoints'), name).expanduser()
    if not path.exists():
        _download(address, path, progress)
    try:
        return read_file(path, map_location, weights_only=None)
    except CheckpointError as error:
        raise CheckpointError(f'{address} is not loaded: {error}\nThe file was downloaded to '
                              f'{path}; remove it to have it downloaded again') from error


def _download(address: str, path: Path, progress: bool) -> None:
    print_log(f'Downloading {address} to {path}', 'current')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(address, str(path), progress=progress)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f'{address} cannot be downloaded to {path}: '
                              f'{type(error).__name__}: {error}\nWithout a network: put the file '
                              'there, or name a local one, or train from scratch '
                              '(--cfg-options model.backbone.init_cfg.checkpoint=FILE, or '
                              'model.backbone.init_cfg=None)') from error
    named = HASH_REGEX.search(path.name)
    if named and len(named[1]) >= 8 and not sha256(path).startswith(named[1]):
        print_log(f'{address}: the name says that the SHA-256 of the file begins with {named[1]}, '
                  f'but it is {sha256(path)}. Either the name is wrong, or the file is damaged '
                  f'(then remove {path})', 'current', logging.WARNING)
