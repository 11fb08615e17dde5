"""The set-up: which stack goes where. Nothing is installed."""

import importlib.util
import json
import sys

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

spec = importlib.util.spec_from_file_location('install', ROOT / 'requirements' / 'install.py')
install = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = install  # where a dataclass looks for its module
spec.loader.exec_module(install)


class Recorded(install.Environment):
    """An environment that notes what pip is given."""

    def __init__(self, *args):
        super().__init__(*args)
        self.path.mkdir(exist_ok=True)
        self.given = []

    def pip_install(self, *arguments):
        self.given.append([str(argument) for argument in arguments])


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setattr(install, 'run', lambda command, **_: ran.append(list(map(str, command))))
    ran = []

    def make(stack):
        env = Recorded(tmp_path / 'venv', tmp_path / 'cache', stack)
        env.ran = ran
        return env

    return make


def pins(stack):
    lines = install.STACKS[stack].constraints.read_text().splitlines()
    return {requirement.name.lower(): requirement for requirement in map(
        Requirement, (line for line in lines if not line.startswith('#')))}


@pytest.mark.parametrize('stack', install.STACKS)
def test_what_is_installed_is_what_is_pinned(stack):
    pinned, asked = pins(stack), install.STACKS[stack].packages
    for requirement in map(Requirement, [*asked, *install.STACKS[stack].torch[:2],
                                         *install.DEPLOYMENT]):
        assert str(requirement.specifier) in ('', str(pinned[requirement.name].specifier))


def test_the_stacks_share_no_package_of_openmmlab():
    """They have the same import names: one of each is all that an environment can hold."""
    def openmmlab(stack):
        return {name for name in pins(stack) if 'mm' in name.split('-')[-1][:2]
                or name.endswith(('openmim', 'onedl-mim'))}

    official, forks = map(openmmlab, ('official', 'onedl'))
    assert {'mmengine', 'mmdet', 'mmpretrain', 'mmsegmentation', 'openmim'} == official
    assert {f'onedl-{name}' for name in
            ('mmengine', 'mmdetection', 'mmpretrain', 'mmsegmentation', 'mim')} == forks


@pytest.mark.parametrize(('stack', 'removed', 'given'), [
    ('official', ['mmcv', 'mmcv-lite'], ['mmcv-lite==2.1.0']),
    ('onedl', ['onedl-mmcv'], ['--no-cache-dir', 'onedl-mmcv==2.3.6'])])
def test_mmcv_without_its_operators(stack, removed, given, environment, tmp_path, monkeypatch):
    env = environment(stack)
    (tmp_path / 'mmcv').mkdir()
    monkeypatch.setattr(env, 'ask', lambda _: str(tmp_path))
    install.install_mmcv(env, 'lite')
    assert env.ran[0][-len(removed):] == removed
    assert env.given == [['-q', '--no-deps', *given]]
    assert (tmp_path / 'mmcv' / '_ext.py').read_bytes() == install.OPERATORS.read_bytes()


def test_each_stack_keeps_its_own_wheel(environment, monkeypatch):
    monkeypatch.delenv('FORCE_CUDA', raising=False)
    folders = []
    for stack in install.STACKS:
        env = environment(stack)
        monkeypatch.setattr(env, 'ask', lambda _: 'cp311 2.12.1+cu130 x86_64 False')
        folder, cuda = install.wheel_folder(env)
        assert not cuda
        folders.append(folder.name)
    assert folders == ['mmcv2.1.0-cp311-2.12.1+cu130-x86_64-cpu',
                       'onedl-mmcv2.3.6-cp311-2.12.1+cu130-x86_64-cpu']


@pytest.mark.parametrize(('made_for', 'asked'), [
    ('official', 'onedl'), ('onedl', 'official'), (None, 'onedl')])
def test_one_environment_never_gets_both(made_for, asked, environment, monkeypatch):
    """None: a set-up before there were two."""
    monkeypatch.setattr(install, 'version_of', lambda python: '3.11')
    env = environment(made_for or 'official')
    (env.path / 'pyvenv.cfg').touch()
    env.create()
    stamps = json.loads(env.stamp_file.read_text())
    assert stamps.pop('stack') == (made_for or 'official')
    if made_for is None:
        env.stamp_file.write_text(json.dumps(stamps))
    again = environment(made_for or 'official')
    again.create()
    assert len(env.ran) == 1
    with pytest.raises(install.SetupError, match=f'of the stack {made_for or "official"}'):
        environment(asked).create()


@pytest.mark.parametrize(('arguments', 'folder'), [
    ([], '.venv'), (['--stack', 'onedl'], '.venv-onedl'), (['--venv', 'mine'], 'mine')])
def test_where_it_goes(arguments, folder, monkeypatch):
    found = []
    monkeypatch.setattr(install, 'set_up', found.append)
    monkeypatch.setattr(sys, 'argv', ['install.py', *arguments])
    assert install.main() == 0
    assert found[0].path == (install.ROOT / folder if folder != 'mine' else install.Path('mine'))


def test_an_unknown_stack(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['install.py', '--stack', 'openmmlab'])
    with pytest.raises(SystemExit):
        install.main()
    assert "invalid choice: 'openmmlab'" in capsys.readouterr().err
