"""Checkpoint files that are damaged, crafted or not what they should be, made of a sound one."""

import functools
import gzip
import hashlib
import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch


def contents(folder):
    """Every file and link below a folder, with the sum of what it holds."""
    return {str(path.relative_to(folder)):
            'link' if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob('*')) if path.is_symlink() or path.is_file()}


class RunsCode:
    """Unpickled freely, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def saved(value, **options):
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _npz(state):
    buffer = io.BytesIO()
    np.savez(buffer, **{key.replace('.', '/'): value.numpy() for key, value in state.items()})
    return buffer.getvalue()


def _torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def _safetensors(state):
    entries, position, data = {}, 0, b''
    for key, value in state.items():
        raw = value.float().numpy().tobytes()
        entries[key] = {'dtype': 'F32', 'shape': list(value.shape),
                        'data_offsets': [position, position + len(raw)]}
        position, data = position + len(raw), data + raw
    header = json.dumps(entries).encode()
    return struct.pack('<Q', len(header)) + header + data


@functools.cache
def _bomb(size=60 << 20, members=1):
    """Of zeros: about a thousandth of what it unpacks to."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(members):
            with archive.open(f'archive/data/{number}', 'w') as file:
                for _ in range(0, size // members, 1 << 20):
                    file.write(bytes(1 << 20))
    return buffer.getvalue()


def not_checkpoints(content, state, seed=0):
    """{what it is: bytes} of files that are damaged, or of another kind.

    Args:
        content: Of a sound checkpoint, with PyTorch's checksums.
        state: The weights in it.
        seed: Where it is cut and which bits are flipped depends on it.
    """
    chance = random.Random(seed)
    values = next(value for value in state.values() if value.numel() > 100).numpy().tobytes()
    files = {f'cut at {part}': content[:int(len(content) * part)] for part in
             (0.001, 0.01, *(round(chance.random(), 3) for _ in range(4)), 0.999)}
    files['cut by a byte'] = content[:-1]
    for number in range(4):
        damaged = bytearray(content)
        damaged[content.index(values) + chance.randrange(len(values))] ^= 1 << chance.randrange(8)
        files[f'flipped bit {number}'] = bytes(damaged)
    middle = len(content) // 2
    return {
        **files,
        'a block of zeros': content[:middle] + bytes(4096) + content[middle + 4096:],
        'twice': content + content[:middle],
        'bytes before it': b'\n' + content,
        'empty': b'',
        'one byte': b'\x80',
        'text': b'epoch 12, loss 0.31\n' * 40,
        'text that is a number': b'1\n',
        'HTML': b'<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n',
        'JSON': json.dumps({'state_dict': {}}).encode(),
        'a pointer of Git LFS': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n',
        'gzip': gzip.compress(content[:2000]),
        'HDF5': b'\x89HDF\r\n\x1a\n' + bytes(500),
        'npz': _npz(state),
        'ONNX': b'\x08\x08\x12\x07pytorch\x1a\x052.0.0:\x10' + bytes(200),
        'safetensors': _safetensors(state),
        'TorchScript': _torchscript(),
        'PNG': b'\x89PNG\r\n\x1a\n' + bytes(300),
        'noise': chance.randbytes(5000),
        'noise after a mark of zip': b'PK\x03\x04' + chance.randbytes(5000),
        'pickle of NumPy arrays': pickle.dumps({key: v.numpy() for key, v in state.items()}),
        'zip bomb': _bomb(),
        'zip bomb of many': _bomb(members=30),
    }


def crafted(path):
    """{format: bytes} of files that would create `path`, were they unpickled freely."""
    value = {'state_dict': {'weight': torch.ones(2)}, 'meta': RunsCode(path)}
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w') as archive:
        archive.writestr('model.pth', saved(value))
    return {
        'zip': saved(value), 'legacy': saved(value, _use_new_zipfile_serialization=False),
        'raw': pickle.dumps(value), 'raw of protocol 0': pickle.dumps(value, protocol=0),
        'zipped by hand': inner.getvalue(),
        'in place of the weights': saved({'state_dict': RunsCode(path)}),
        'in place of everything': saved(RunsCode(path)),
        'as a key': saved({'state_dict': {('a', 1): RunsCode(path)}}),
    }


def _with(state, change, every=False):
    """Weights of which one, or every one, is changed: the middle of those with many values."""
    floating = [key for key, value in state.items() if value.is_floating_point()]
    chosen = set(floating if every else [floating[len(floating) // 2]])
    return {key: change(value.clone()) if key in chosen else value for key, value in state.items()}


def _first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor
    return change


def wrong_weights(state):
    """{what they are: weights} of the right names, none of which is to be taken."""
    keys = list(state)
    return {
        'NaN': _with(state, _first(float('nan'))),
        'Inf': _with(state, _first(float('inf'))),
        'all NaN': _with(state, lambda v: v * float('nan'), every=True),
        'integers': _with(state, lambda v: v.to(torch.int64), every=True),
        'one integer': _with(state, lambda v: v.to(torch.int32)),
        'bool': _with(state, lambda v: v > 0),
        'complex': _with(state, lambda v: v.to(torch.complex64)),
        'meta': _with(state, lambda v: v.to('meta')),
        'all meta': _with(state, lambda v: v.to('meta'), every=True),
        'sparse': _with(state, lambda v: v.to_sparse()),
        'quantized': _with(state, lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)),
        'another shape': _with(state, lambda v: v[:-1]),
        'one dimension more': _with(state, lambda v: v[None]),
        'a number': _with(state, lambda v: v.sum()),
        'no values': _with(state, lambda v: v[:0]),
        'a list': _with(state, lambda v: v.flatten()[:3].tolist()),
        'none': _with(state, lambda v: None),
        'half of them': {key: state[key] for key in keys[:len(keys) // 2]},
        'one missing': {key: state[key] for key in keys if key != 'backbone.bn1.weight'},
        'one of them': {keys[0]: state[keys[0]]},
        'none of them': {},
        'mixed prefixes': {('module.' if number % 2 else '') + key: state[key]
                           for number, key in enumerate(keys)},
        'another prefix': {f'network.{key}': value for key, value in state.items()},
        'a prefix twice': {f'backbone.{key}': value for key, value in state.items()},
        'numbers for keys': dict(enumerate(state.values())),
        'a number for a key': {**state, 3: torch.ones(1)},
        'a tuple for a key': {**state, ('a', 1): torch.ones(1)},
        'none for a key': {**state, None: torch.ones(1)},
        'a huge view': _with(state, lambda v: torch.ones(1).expand(10 ** 6, 10 ** 6)),
        'a huge head': {**state, 'head.fc.weight': torch.ones(1, 1).expand(10 ** 10, 64),
                        'head.fc.bias': torch.ones(1).expand(10 ** 10)},
        'another network': torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
                                               ).state_dict(),
    }


def wrong_contents(state):
    """{what it is: content} of files that PyTorch loads, and which are no checkpoint."""
    return {
        'nothing': None, 'a number': 3, 'words': 'weights', 'a list': list(state.values())[:3],
        'a tensor': torch.ones(3), 'an empty dictionary': {},
        'state_dict is None': {'state_dict': None}, 'state_dict is a list': {'state_dict': [1]},
        'state_dict is a tensor': {'state_dict': torch.ones(3)},
        'state_dict is in a state_dict': {'state_dict': {'state_dict': state}},
        'an optimizer alone': {'optimizer': {'state': {}, 'param_groups': []}},
        'weights under another name': {'model': OrderedDict(state)},
    }


def odd_metas():
    """{what it is: value} under `meta`, beside sound weights."""
    return {
        'none': None, 'a list': [1, 2], 'words': 'trained', 'a number': 3,
        'form is unknown': {'form': 'liquid'}, 'form is a list': {'form': [1]},
        'dataset_meta is words': {'dataset_meta': 'COCO'},
        'dataset_meta is a list': {'dataset_meta': [1]},
        'classes are a number': {'dataset_meta': {'classes': 3}},
        'keys are numbers': {'dataset_meta': {1: 2}},
    }


def sample():
    """The least that the functions above take: (content of a file, weights in it)."""
    state = {'backbone.bn1.weight': torch.ones(200), 'backbone.bn1.bias': torch.ones(2)}
    return saved({'state_dict': state}), state
