"""Whatever MMEngine reads, from wherever: no code runs, and damage is noticed."""

import functools
import http.server
import logging
import pickle
import socket
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import mmengine.runner.checkpoint as mmengine_checkpoint
import pytest
import torch
import torchvision
from helpers import randomize, relative_error
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from orepa_mm.checkpoints import load_checkpoint as load_ours
from orepa_mm.checkpoints import load_pretrained
from orepa_mm.errors import CheckpointError
from orepa_mm.files import sha256
from orepa_mm.openmmlab.patches import patch


class Creates:
    """Unpickled freely, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class CreatesByOpen(Creates):
    def __reduce__(self):
        return open, (str(self.path), 'w')


class CreatesByEval(Creates):
    def __reduce__(self):
        return eval, (f'open({str(self.path)!r}, "w")',)


CRAFTED = (Creates, CreatesByOpen, CreatesByEval)
#: The address, and what the pickle asks for.
REFUSED = r'^http://127\.0\.0\.1.*more than tensors.*(pathlib|open|eval)'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder into which the hub downloads."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def server(tmp_path, cache):
    """(folder that is served, its address, requests so far), on the loopback address."""
    folder, requests = tmp_path / 'served', []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    served = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=served.serve_forever, args=[0.01])
    thread.start()
    yield folder, f'http://127.0.0.1:{served.server_address[1]}', requests
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def schemes(server, monkeypatch):
    """Every way to name the served `name.pth`."""
    _, address, _ = server
    tables = {'get_torchvision_models': {}, 'get_external_models': {}, 'get_mmcls_models': {}}
    for name, table in tables.items():
        table['name'] = f'{address}/name.pth'
        monkeypatch.setattr(mmengine_checkpoint, name, lambda table=table: table)
    return {'http': f'{address}/name.pth', **{
        scheme: f'{scheme}://name' for scheme in (
            'torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls')}}


SCHEMES = ('http', 'torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls')


def layer():
    return nn.Sequential(nn.Linear(4, 3))


def save(path, **more):
    """A good checkpoint, with what a runner puts beside the weights."""
    history = HistoryBuffer()
    history.update(1.5)
    state = nn.ModuleDict({'backbone': layer()}).state_dict()
    torch.save({'state_dict': state, 'message_hub': {'loss': history}, **more}, path)
    return state


def ways(source):
    """Everything that reads an address or a file."""
    model = nn.ModuleDict({'backbone': layer()})
    return {'loader': lambda: CheckpointLoader.load_checkpoint(source),
            'pretrained': lambda: load_pretrained(model, source),
            'mmengine': lambda: load_checkpoint(model, source)}


@pytest.mark.parametrize('crafted', CRAFTED)
@pytest.mark.parametrize('scheme', SCHEMES)
def test_no_address_runs_code(scheme, crafted, schemes, server, tmp_path):
    torch.save({'state_dict': {}, 'meta': crafted(tmp_path / 'ran')}, server[0] / 'name.pth')
    pickle.loads(pickle.dumps(crafted(tmp_path / 'it works')))
    assert (tmp_path / 'it works').exists()
    for way in ways(schemes[scheme]).values():
        with pytest.raises(CheckpointError, match=REFUSED):
            way()
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('crafted', CRAFTED)
def test_no_file_runs_code(crafted, tmp_path):
    for new_format in (True, False):
        path = tmp_path / f'{new_format}.pth'
        torch.save({'meta': crafted(tmp_path / 'ran')}, path,
                   _use_new_zipfile_serialization=new_format)
        for way in ways(str(path)).values():
            with pytest.raises(CheckpointError, match='more than tensors'):
                way()
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('scheme', SCHEMES)
def test_good_checkpoints_load(scheme, schemes, server, cache):
    folder, _, requests = server
    state = save(folder / 'name.pth')
    loaded = CheckpointLoader.load_checkpoint(schemes[scheme], map_location='cpu')
    prefix = 'backbone.' if scheme == 'mmcls' else ''  # that scheme takes the backbone out
    assert loaded['state_dict'].keys() == {key.removeprefix(prefix) for key in state}
    for load in (lambda part: load_pretrained(part, schemes[scheme], 'backbone.'[len(prefix):]),
                 lambda part: load_checkpoint(part, schemes[scheme],
                                              revise_keys=[('^backbone.', '')])):
        model = layer()
        load(model)
        assert torch.equal(model[0].weight, state['backbone.0.weight'])
    assert len(requests) == 1  # the others were read from where the hub keeps it
    assert [path.name for path in cache.iterdir()] == ['name.pth']


def test_init_cfg_of_a_stock_backbone(server, tmp_path):
    folder, address, _ = server
    register_all_modules(init_default_scope=True)
    cfg = dict(type='ResNet', depth=18, base_channels=8)
    state = MODELS.build(cfg).state_dict()
    torch.save({'state_dict': state}, folder / 'good.pth')
    torch.save({'state_dict': state, 'meta': Creates(tmp_path / 'ran')}, folder / 'bad.pth')

    def built(name):
        model = MODELS.build({**cfg, 'init_cfg': dict(type='Pretrained',
                                                      checkpoint=f'{address}/{name}')})
        model.init_weights()
        return model

    assert torch.equal(built('good.pth').conv1.weight, state['conv1.weight'])
    with pytest.raises(CheckpointError, match=r'bad\.pth'):
        built('bad.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('options', [dict(type='ResNet', conv_cfg=dict(type='OREPA')),
                                     dict(type='OREPAResNet')], ids=lambda o: o['type'])
def test_torchvisions_weights_are_expanded(options, server, schemes, monkeypatch):
    """What stock configs start from; torchvision's own network is the oracle."""
    said = []
    monkeypatch.setattr('orepa_mm.checkpoints.expansion.print_log',
                        lambda message, *_: said.append(message))
    register_all_modules(init_default_scope=True)
    theirs = randomize(torchvision.models.resnet18()).eval()
    torch.save(theirs.state_dict(), server[0] / 'name.pth')
    model = MODELS.build(dict(depth=18, **options, init_cfg=dict(
        type='Pretrained', checkpoint=schemes['torchvision'])))
    model.init_weights()
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = x
        for part in list(theirs.children())[:-2]:  # without pooling and classifier
            features = part(features)
        assert relative_error(model(x)[-1], features) < 1e-4
    (line,) = said
    source = 'the checkpoint' if 'conv_cfg' in options else schemes['torchvision']
    assert line.startswith(f'{source}: plain weights')


def test_only_pytorchs_own_switch_runs_code(server, tmp_path, monkeypatch):
    folder, address, _ = server
    torch.save(Creates(tmp_path / 'ran'), folder / 'name.pth')
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(CheckpointError):
        load_ours(folder / 'name.pth')
    assert not (tmp_path / 'ran').exists()
    for source in (folder / 'name.pth', f'{address}/name.pth'):
        with pytest.warns(UserWarning, match='TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'):
            CheckpointLoader.load_checkpoint(str(source))
        assert (tmp_path / 'ran').exists()
        (tmp_path / 'ran').unlink()


@pytest.mark.parametrize('crafted', CRAFTED)
@pytest.mark.parametrize('source', ['openmmlab://name', 's3://name.pth'])
def test_no_other_scheme_runs_code(source, crafted, tmp_path, monkeypatch):
    """MMEngine itself reads these; the forks' would run the code where a safe load fails."""
    torch.save({'meta': crafted(tmp_path / 'ran')}, tmp_path / 'name.pth')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    monkeypatch.setattr(mmengine_checkpoint, 'get_external_models', lambda: {'name': 'name.pth'})
    monkeypatch.setattr(mmengine_checkpoint, 'get_deprecated_model_names', dict)
    monkeypatch.setattr(mmengine_checkpoint, 'get_file_backend', lambda *_, **__: SimpleNamespace(
        get=lambda _: (tmp_path / 'name.pth').read_bytes()))
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(source)
    assert not (tmp_path / 'ran').exists()


def test_what_cannot_be_downloaded_is_named(server, cache):
    _, address, _ = server
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        nobody = f'http://127.0.0.1:{closed.getsockname()[1]}/model.pth'
    for source, reason in ((f'{address}/nothing.pth', '404'), (nobody, 'refused')):
        for way in ways(source).values():
            with pytest.raises(CheckpointError, match=f'{source} cannot be downloaded .*{reason}'):
                way()
    with pytest.raises(CheckpointError, match='names no file'):
        CheckpointLoader.load_checkpoint(f'{address}/')
    assert list(cache.iterdir()) == []


def test_damage_behind_an_address(server, cache):
    folder, address, _ = server
    save(folder / 'cut.pth')
    (folder / 'cut.pth').write_bytes((folder / 'cut.pth').read_bytes()[:-100])
    for way in ways(f'{address}/cut.pth').values():
        with pytest.raises(CheckpointError, match=r'cut\.pth is not loaded.*damaged(.|\n)*remove'):
            way()
    save(folder / 'cut.pth')
    (cache / 'cut.pth').unlink()
    CheckpointLoader.load_checkpoint(f'{address}/cut.pth')


@pytest.mark.parametrize(('name', 'warned'), [
    ('model-{right}.pth', False), ('model-01234567.pth', True),
    ('epoch-12.pth', False), ('model.pth', False)])
def test_a_hash_in_the_name(name, warned, server, monkeypatch):
    folder, address, _ = server
    warnings = []
    monkeypatch.setattr('orepa_mm.checkpoints.sources.print_log', lambda message, _, level=None:
                        warnings.append(message) if level == logging.WARNING else None)
    save(folder / 'any.pth')
    name = name.format(right=sha256(folder / 'any.pth')[:8])
    (folder / 'any.pth').rename(folder / name)
    CheckpointLoader.load_checkpoint(f'{address}/{name}')
    assert [address in message and 'SHA-256' in message for message in warnings] == [True] * warned


def test_a_file_zipped_by_hand_is_unpacked(server):
    folder, address, _ = server
    state = save(folder / 'inner.pth')
    with zipfile.ZipFile(folder / 'zipped.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / 'inner.pth', 'inner.pth')
    for source in (f'{address}/zipped.pth', str(folder / 'zipped.pth')):
        loaded = CheckpointLoader.load_checkpoint(source)['state_dict']
        assert torch.equal(loaded['backbone.0.weight'], state['backbone.0.weight'])


@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_process_downloads(rank, server, cache, monkeypatch):
    folder, address, requests = server
    state = save(folder / 'name.pth')
    events = []
    monkeypatch.setattr('orepa_mm.checkpoints.sources.get_dist_info', lambda: (rank, 2))

    def barrier():
        events.append(len(requests))
        if rank == 1:  # by now the other one has written it
            cache.mkdir(parents=True)
            (cache / 'name.pth').write_bytes((folder / 'name.pth').read_bytes())

    monkeypatch.setattr(torch.distributed, 'barrier', barrier)
    loaded = CheckpointLoader.load_checkpoint(f'{address}/name.pth')['state_dict']
    assert torch.equal(loaded['backbone.0.weight'], state['backbone.0.weight'])
    assert events == [1 - rank]
    assert len(requests) == 1 - rank


def test_local_files_as_mmengine_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    state = save(tmp_path / 'model.pth')
    loaded = CheckpointLoader.load_checkpoint('~/model.pth', map_location='meta')['state_dict']
    assert loaded.keys() == state.keys()
    assert loaded['backbone.0.weight'].is_meta
    with pytest.raises(FileNotFoundError, match='can not be found'):
        CheckpointLoader.load_checkpoint('~/nothing.pth')
    torch.save(torch.ones(2), tmp_path / 'tensor.pth')
    assert CheckpointLoader.load_checkpoint('~/tensor.pth').tolist() == [1, 1]


def test_a_second_call_changes_nothing():
    before = dict(CheckpointLoader._schemes)
    patch()
    assert list(CheckpointLoader._schemes.items()) == list(before.items())
