"""A model for predictions from nothing but the ONNX files that `reparam` wrote."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.utils import import_modules_from_strings
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..export.onnx.end2end_file import EndToEndFile, dataset_meta
from ..export.onnx.graphs import graph_files, network_graphs, prepared
from ..export.onnx.quantize_run import model_of_files
from ..export.onnx.session import Session
from .evidence import built_model

#: What of a config a network needs to predict, beside its test pipeline.
_KEPT = ('default_scope', 'custom_imports', 'data_preprocessor', 'model')
_HOW = 'write it anew with `mim run orepa_mm reparam ... --onnx`, or give the folder of the model'


def network_meta(cfg: Config, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of the network must say, so that it is enough to predict.

    Args:
        cfg: Of the deployed model.
        batch: What the data preprocessor made of the first test images.

    Returns:
        `config`, a Python literal, and `image_size`, height and width of these images. Nothing
        if the config holds what has no literal, or no test pipeline.
    """
    content = cfg.to_dict()
    kept = {key: content[key] for key in _KEPT if content.get(key) is not None}
    dataset = (content.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and isinstance(dataset.get('dataset'), dict):
        dataset = dataset['dataset']  # of a wrapper
    kept['test_dataloader'] = {'dataset': {'pipeline': dataset.get('pipeline')}}
    text = repr(kept)
    try:
        whole = dataset.get('pipeline') and ast.literal_eval(text) == kept
    except (SyntaxError, ValueError):
        whole = False
    return {'config': text, 'image_size': list(batch['inputs'].shape[2:])} if whole else {}


def load_onnx(path: str | Path) -> nn.Module:
    """Load an ONNX file that `reparam` wrote, to predict with it on the CPU.

    Of a network alone the rest of the model is built from the config in the
    file's metadata; further graphs of a detector lie beside it. Like every
    config, it names what is built and imported: load what you trust.

    Args:
        path: `model_end2end.onnx`; or the network, `model.onnx` or `model_int8.onnx`.

    Returns:
        A model for `predict` and for OpenMMLab's inferencers, as of `load_model`.

    Raises:
        ImportError: If ONNX Runtime is missing, or a toolbox that the model is of.
        FileNotFoundError: If there is no such file, or a further graph is missing.
        CheckpointError: If it is no ONNX file, none that `reparam` wrote, or an older one.
        ConfigError: If the config in it builds no model.
    """
    path = Path(path).expanduser()
    meta = Session(path).meta
    graph = meta.get('graph')
    if graph == 'end2end':
        return EndToEndFile(path).eval()
    if graph in ('bbox', 'mask'):
        raise CheckpointError(f'{path} is the graph {graph} of a detector alone: give the file of '
                              'its network, which lies beside it (model.onnx)')
    if graph != 'network':
        raise CheckpointError(f'{path} is no ONNX file that `mim run orepa_mm reparam` wrote: its '
                              'metadata do not say what it is')
    if not {'config', 'image_size'} <= meta.keys():
        raise CheckpointError(f'{path} does not hold its config, without which nothing can be '
                              f'predicted; an older version wrote it: {_HOW}')
    model, cfg = _model_without_weights(path, meta)
    batch = {'inputs': torch.zeros(1, 3, *ast.literal_eval(meta['image_size'])),
             'data_samples': []}
    files = graph_files(path, network_graphs(model, batch))
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(f'there is no {" and no ".join(missing)} beside {path}: the '
                                'network of a detector of two stages is of several files')
    model = model_of_files(model, files, batch)
    model.dataset_meta = model._dataset_meta = dataset_meta(meta)
    model.cfg = model._config = cfg
    return model.eval()


def _model_without_weights(path: Path, meta: Mapping[str, str]) -> tuple[nn.Module, Config]:
    """The model of the config in a file, at random weights, which do not count."""
    try:
        cfg = Config(ast.literal_eval(meta['config']))
        if cfg.get('custom_imports'):
            import_modules_from_strings(**cfg.custom_imports)
        return prepared(built_model(cfg)), cfg
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged config ends in
        raise ConfigError(f'the config in {path} builds no model ({type(error).__name__}: {error}):'
                          f' {_HOW}') from error
