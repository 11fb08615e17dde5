"""Files that are no sound checkpoint, at every door: one line that names them, and nothing else.

Single bits of the values and cuts anywhere are in tests/checkpoints/test_io.py as well; there they
are told from what has no effect.
"""

import random

import damage
import pytest
import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint

import orepa_mm
from orepa_mm.checkpoints import load_checkpoint, load_pretrained, load_weights
from orepa_mm.engine.resume import newest_checkpoint
from orepa_mm.errors import CheckpointError
from orepa_mm.export import convert_checkpoint_file

#: With blanks and letters that are not of ASCII, as users have them.
NAME = 'a mo del é 模.pth'
KINDS = sorted(damage.not_checkpoints(*damage.sample()))
CRAFTED = sorted(damage.crafted('x'))
WEIGHTS = sorted(damage.wrong_weights(damage.sample()[1]))
CONTENTS = sorted(damage.wrong_contents({}))


@pytest.fixture(scope='module')
def damaged(room):
    return damage.not_checkpoints(room.content, room.state)


def doors(room, path):
    """Whatever reads a checkpoint file, by name."""
    def deployed():
        folder = path.parent / 'deployed'
        folder.mkdir(exist_ok=True)
        (folder / 'config.py').write_bytes((room.folder / 'deployed/config.py').read_bytes())
        (folder / 'model.pth').write_bytes(path.read_bytes())
        return orepa_mm.load(folder)

    def resumed():
        (path.parent / 'last_checkpoint').write_text(str(path))
        return newest_checkpoint(path.parent)

    out = path.parent / 'out.pth'
    return {
        'load_checkpoint': lambda: load_checkpoint(path),
        'load_weights': lambda: load_weights(room.model, path),
        'load_pretrained': lambda: load_pretrained(room.model.backbone, str(path), 'backbone'),
        'mmengine': lambda: mmengine_load_checkpoint(room.model, str(path), strict=True),
        'loader': lambda: CheckpointLoader.load_checkpoint(str(path)),
        'convert': lambda: convert_checkpoint_file(path, out),
        'deploy': lambda: convert_checkpoint_file(path, out, form='deploy'),
        'load': deployed, 'resume': resumed}


def require_refusal(room, path, names, content):
    """At each of these doors: an error that names the file, and no trace."""
    path.write_bytes(content)
    for name, door in doors(room, path).items():
        if name not in names:
            continue
        with pytest.raises(CheckpointError) as error:
            door()
        said = str(error.value)
        assert path.name in said or (name == 'load' and 'model.pth' in said), (name, said)
        assert 'weights_only' not in said, (name, said)
        assert 'WeightsUnpickler' not in said, (name, said)
        assert len(said) < 2000, (name, said)
        assert path.read_bytes() == content
        assert not (path.parent / 'out.pth').exists()
    assert all(torch.equal(value, room.state[key])
               for key, value in room.model.state_dict().items())


EVERY = ('load_checkpoint', 'load_weights', 'load_pretrained', 'mmengine', 'loader', 'convert',
         'deploy', 'load', 'resume')
#: Those that ask for weights that fit: MMEngine warns of what does not.
STRICT = ('load_weights', 'load_pretrained', 'convert', 'deploy')


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_files_and_those_of_others(kind, damaged, room, nothing_changes, recwarn):
    require_refusal(room, nothing_changes / NAME, EVERY, damaged[kind])
    assert not [str(warning.message) for warning in recwarn if 'pickle' in str(warning.message)]


@pytest.mark.parametrize('kind', CRAFTED)
def test_code_does_not_run(kind, room, nothing_changes):
    content = damage.crafted(nothing_changes / 'ran')[kind]
    require_refusal(room, nothing_changes / NAME, EVERY, content)
    assert not (nothing_changes / 'ran').exists()


@pytest.mark.parametrize('kind', WEIGHTS)
def test_weights_that_are_none(kind, room, nothing_changes):
    """In training form; each has the right keys but for what its name says."""
    state = damage.wrong_weights(room.state)[kind]
    names = STRICT
    if kind == 'a huge head':
        names = ('load_weights', 'convert', 'deploy')  # a backbone has no head
    require_refusal(room, nothing_changes / NAME, names, damage.saved({'state_dict': state}))


@pytest.mark.parametrize('kind', [
    'NaN', 'Inf', 'integers', 'complex', 'meta', 'sparse', 'quantized', 'another shape',
    'one missing', 'half of them', 'mixed prefixes', 'a number for a key', 'a huge view'])
def test_plain_weights_that_are_none(kind, room, nothing_changes):
    """What would be expanded."""
    state = damage.wrong_weights(room.plain)[kind]
    require_refusal(room, nothing_changes / NAME, ('load_pretrained', 'convert'),
                    damage.saved({'state_dict': state}))


@pytest.mark.parametrize('kind', CONTENTS)
def test_contents_that_are_no_checkpoint(kind, room, nothing_changes):
    content = damage.wrong_contents(room.state)[kind]
    require_refusal(room, nothing_changes / NAME, STRICT, damage.saved(content))


@pytest.mark.parametrize('kind', sorted(damage.odd_metas()))
def test_what_is_said_beside_the_weights(kind, room, nothing_changes):
    """Refused, or of no effect: the weights are sound."""
    path = nothing_changes / NAME
    meta = damage.odd_metas()[kind]
    content = damage.saved({'state_dict': room.state, 'meta': meta})
    if meta is None or (isinstance(meta, dict) and 'form' in meta):
        path.write_bytes(content)
        assert load_weights(room.model, path)['state_dict'].keys() == room.state.keys()
    else:
        require_refusal(room, path, ('load_checkpoint', 'load_weights', 'convert', 'deploy'),
                        content)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken(dtype, room, nothing_changes):
    path = nothing_changes / NAME
    state = {key: value.to(dtype) if value.is_floating_point() else value
             for key, value in room.state.items()}
    path.write_bytes(damage.saved({'state_dict': state}))
    load_weights(room.model, path)
    assert all(torch.equal(value, state[key].to(value.dtype))
               for key, value in room.model.state_dict().items())
    room.model.load_state_dict(room.state)
    convert_checkpoint_file(path, nothing_changes / 'out.pth', form='deploy')
    plain = load_checkpoint(nothing_changes / 'out.pth')['state_dict']
    tolerance = 1e-5 if dtype is torch.float64 else 0.1
    for key, value in plain.items():
        if value.is_floating_point():
            assert value.dtype is dtype
            assert torch.allclose(value.float(), room.plain[key], atol=tolerance, rtol=tolerance)


def test_a_file_that_is_a_folder_or_a_link_to_itself(room, nothing_changes):
    folder = nothing_changes / 'folder.pth'
    folder.mkdir()
    (nothing_changes / 'itself.pth').symlink_to('itself.pth')
    (nothing_changes / 'a.pth').symlink_to('b.pth')
    (nothing_changes / 'b.pth').symlink_to('a.pth')
    for path in (folder, nothing_changes / 'itself.pth', nothing_changes / 'a.pth'):
        for name in ('load_checkpoint', 'load_weights', 'load_pretrained', 'mmengine', 'convert'):
            with pytest.raises(FileNotFoundError, match=path.name):
                doors(room, path)[name]()


@pytest.mark.parametrize(('kind', 'words'), [
    ('HTML', 'a web page: download the file itself'), ('empty', 'it is empty; copy or download'),
    ('a pointer of Git LFS', 'git lfs pull'), ('HDF5', 'an HDF5 file'), ('npz', 'a file of NumPy'),
    ('gzip', 'a gzip archive: unpack it'), ('ONNX', 'an ONNX file'), ('PNG', 'an image'),
    ('safetensors', 'safetensors.torch.load_file'), ('TorchScript', 'a TorchScript archive'),
    ('zip bomb', 'MB would come out of'), ('zip bomb of many', 'MB would come out of'),
    ('cut by a byte', 'is damaged .*copy or download it again'),
    ('flipped bit 0', 'is not as it was written; copy or download it again')])
def test_it_says_what_a_file_is(kind, words, damaged, tmp_path):
    path = tmp_path / NAME
    path.write_bytes(damaged[kind])
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


@pytest.mark.long
@pytest.mark.parametrize('seed', range(10))
def test_many_more(seed, room, nothing_changes):
    """Anything that a disk or a network may do to a file, three times in a row."""
    chance, path = random.Random(seed), nothing_changes / NAME
    for _ in range(200):
        content = bytearray(damage.saved({'state_dict': room.state}, **chance.choice(
            [{}, {'_use_new_zipfile_serialization': False}])))
        for _ in range(3):
            place, length = chance.randrange(len(content)), chance.randrange(1, 5000)
            kind = chance.choice(['cut', 'zeros', 'noise', 'lost', 'doubled'])
            part = content[place:place + length]
            if kind == 'cut':
                content = content[:max(place, 1)]
            else:
                content[place:place + length] = {
                    'zeros': bytes(len(part)), 'noise': chance.randbytes(len(part)), 'lost': b'',
                    'doubled': part * 2}[kind]
        path.write_bytes(bytes(content))
        said = path.name
        try:
            load_weights(room.model, path)
        except CheckpointError as error:
            said = str(error)
        assert path.name in said
        assert 'weights_only' not in said
    room.model.load_state_dict(room.state)
