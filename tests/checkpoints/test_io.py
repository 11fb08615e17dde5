"""Reading, loading and writing checkpoint files."""

import pickle

import pytest
import torch
from torch import nn

from orepa_mm.checkpoints import load_checkpoint, load_weights, model_state_dict
from orepa_mm.errors import CheckpointError
from orepa_mm.files import written_whole


class Evil:
    def __reduce__(self):
        return (exec, ('raise SystemExit("code of the checkpoint ran")',))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint .*nothing\.pth'):
        load_checkpoint(tmp_path / 'nothing.pth')


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'meta': Evil()}, path)
    with pytest.raises(CheckpointError, match='exec'):
        load_checkpoint(path)


@pytest.mark.parametrize('content', [b'', b'no checkpoint at all', pickle.dumps({'a': 1})])
def test_damaged_file(tmp_path, content):
    path = tmp_path / 'damaged.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='damaged'):
        load_checkpoint(path)


def test_truncated_file(tmp_path):
    path = tmp_path / 'truncated.pth'
    torch.save({'state_dict': {'weight': torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match='damaged'):
        load_checkpoint(path)


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'meta': {}},
                                  lambda s: {f'module.{k}': v for k, v in s.items()}])
def test_common_forms(wrap):
    state = nn.Linear(2, 3).state_dict()
    assert model_state_dict(wrap(state)).keys() == state.keys()


def test_without_weights():
    with pytest.raises(CheckpointError, match='no model weights'):
        model_state_dict({'state_dict': {}})


def test_loading_is_strict(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save(nn.Linear(2, 3).state_dict(), path)
    model = nn.Linear(2, 3)
    load_weights(model, path)
    assert torch.equal(model.weight, load_checkpoint(path)['weight'])
    for other, message in ((nn.Linear(2, 4), 'size mismatch'),
                           (nn.Linear(2, 3, bias=False), 'bias'),
                           (nn.Sequential(nn.Linear(2, 3)), '0.weight')):
        with pytest.raises(CheckpointError, match=message):
            load_weights(other, path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'folder' / 'file.txt'
    with written_whole(path) as temporary:
        temporary.write_text('old')

    def write_half():
        with written_whole(path) as temporary:
            temporary.write_text('half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == 'old'
    assert [p.name for p in path.parent.iterdir()] == ['file.txt']
