"""Reading and writing checkpoint files. What is no sound file at all: tests/hostile."""

import zipfile

import pytest
import torch
from mmengine.runner import CheckpointLoader
from torch import nn

from orepa_mm.checkpoints import load_checkpoint, load_weights, model_state_dict
from orepa_mm.checkpoints.io import below
from orepa_mm.errors import CheckpointError
from orepa_mm.files import written_whole


class Evil:
    def __reduce__(self):
        return (exec, ('raise SystemExit("code of the checkpoint ran")',))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint .*nothing\.pth'):
        load_checkpoint(tmp_path / 'nothing.pth')


def state():
    return {'weight': torch.arange(1., 20.), 'count': torch.arange(3)}


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


READERS = {'ours': load_checkpoint,
           'mmengine': lambda path: CheckpointLoader.load_checkpoint(str(path))}


@pytest.mark.parametrize('reader', READERS)
def test_no_flipped_bit_becomes_another_weight(reader, tmp_path):
    """Refused, or without effect: there are bytes between the records that nothing reads."""
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': state()}, path)
    content = path.read_bytes()
    values = [content.index(tensor.numpy().tobytes()) * 8 for tensor in state().values()]
    bits = [*range(values[0], values[0] + 19 * 32, 7), *range(values[1], values[1] + 3 * 64, 5)]
    for bit in bits:
        path.write_bytes(flipped(content, bit))
        with pytest.raises(CheckpointError, match=r'model\.pth is damaged.*data/\d'):
            READERS[reader](path)
    refused = 0
    for bit in range(0, len(content) * 8, 41):
        path.write_bytes(flipped(content, bit))
        try:
            loaded = READERS[reader](path)['state_dict']
        except CheckpointError:
            refused += 1
        else:
            assert all(torch.equal(loaded[key], value) for key, value in state().items())
    assert refused > 100


def test_a_record_marked_as_a_folder_is_not_left_at_what_was_in_memory(tmp_path):
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': state()}, path)
    content = path.read_bytes()
    entry = content.rindex(b'data/0') - 46 - len('model/')  # in the central directory
    assert content[entry:entry + 4] == b'PK\x01\x02'
    path.write_bytes(flipped(content, (entry + 38) * 8 + 4))  # the attribute of a folder in DOS
    with pytest.raises(CheckpointError, match=r'damaged.*data/0'):
        load_checkpoint(path)


def test_files_without_checksums_load(tmp_path):
    torch.save(state(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / 'without.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / 'without.pth') as archive:
        assert archive.testzip() is not None
    for name in ('old', 'without'):
        for reader in READERS.values():
            loaded = reader(tmp_path / f'{name}.pth')
            assert all(torch.equal(loaded[key], value) for key, value in state().items())


def test_old_format_cut_anywhere(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r'old\.pth'):
            load_checkpoint(path)


def test_a_refusal_does_not_advise_to_load_unsafely(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save({'meta': Evil()}, path)
    with pytest.raises(CheckpointError, match='GLOBAL exec was not an allowed global') as error:
        load_checkpoint(path)
    assert 'add_safe_globals' not in str(error.value)
    assert 'weights_only' not in str(error.value)


def test_versions_of_modules_are_kept(tmp_path):
    """Code of some heads renames the keys of older versions, and those of files without one."""
    class Renamed(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            assert local_metadata.get('version') == 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model = nn.Sequential(Renamed(2, 3))
    wrapped = nn.ModuleDict({'module': model}).state_dict()
    torch.save({'state_dict': wrapped}, tmp_path / 'model.pth')
    load_weights(model, tmp_path / 'model.pth')
    load_weights(nn.DataParallel(model).module, tmp_path / 'model.pth')
    part = below(nn.ModuleDict({'backbone': model, 'head': model}).state_dict(), 'backbone.')
    model.load_state_dict(part, strict=True)
    assert part.keys() == model.state_dict().keys()
    assert part._metadata.keys() == {'', '0'}


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s, 'meta': {}},
                                  lambda s: {f'module.{k}': v for k, v in s.items()}])
def test_common_forms(wrap):
    state = nn.Linear(2, 3).state_dict()
    assert model_state_dict(wrap(state)).keys() == state.keys()


def test_without_weights():
    with pytest.raises(CheckpointError, match='no model weights'):
        model_state_dict({'state_dict': {}})


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


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save({'a': torch.ones(1)}, tmp_path / 'x.pth')
    assert load_checkpoint('~/x.pth')['a'] == 1
