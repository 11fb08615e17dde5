"""Safe loading of what the runner saves, and of nothing else."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import orepa_mm  # noqa: F401  puts the allowlist in place


def roundtrip(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_the_runners_log_loads():
    history = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        history.update(value)
    loaded = roundtrip({'loss': history, 'best': np.float64(0.5), 'epoch': np.int64(3),
                        'array': np.arange(3.0)})
    assert isinstance(loaded['loss'], HistoryBuffer)
    for statistic in ('min', 'max', 'current', 'mean'):
        assert getattr(loaded['loss'], statistic)() == getattr(history, statistic)()
        assert loaded['loss'].statistics(statistic) == history.statistics(statistic)
    assert loaded['best'] == 0.5
    assert loaded['epoch'] == 3
    assert loaded['array'].tolist() == [0, 1, 2]


def test_names_of_numpy_1_load():
    buffer = io.BytesIO()
    torch.save({'best': np.float64(0.5)}, buffer)
    assert b'numpy._core' in buffer.getvalue()
    old = pickle.dumps(np.float64(0.5), protocol=2).replace(b'numpy._core', b'numpy.core')
    module = torch.load(io.BytesIO(_as_zip(old)), weights_only=True)
    assert module == 0.5


def _as_zip(data):
    """A torch file around the given pickle."""
    buffer = io.BytesIO()
    with torch.serialization._open_zipfile_writer(buffer) as writer:
        writer.write_record('data.pkl', data, len(data))
        writer.write_record('byteorder', b'little', 6)
    return buffer.getvalue()


class Getattr:
    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize('value', [
    Getattr(HistoryBuffer, '__init__'), Getattr(HistoryBuffer, '__subclasses__'),
    Getattr(np.ndarray, 'tofile'), Getattr(HistoryBuffer, 'update'),
    Call(os.system, 'true'), Call(eval, '1'),
], ids=['__init__', '__subclasses__', 'ndarray', 'update', 'os.system', 'eval'])
def test_anything_else_is_refused(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=True)
