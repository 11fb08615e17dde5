"""The set-up: what goes where, and what it leaves alone. Nothing is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

spec = importlib.util.spec_from_file_location('install', ROOT / 'requirements' / 'install.py')
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


class Recorded(install.Environment):
    """An environment that notes the commands instead of running them."""

    def __init__(self, path, stack='official'):
        super().__init__(path, stack)
        self.ran = []

    def run(self, *command, **variables):
        self.ran.append(' '.join(map(str, command)))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'venv'


@pytest.fixture
def answers(monkeypatch):
    """What commands print, by a part of them; any other prints 'yes'."""
    answers = {'sys.version_info': '3.11'}
    monkeypatch.setattr(install, 'output', lambda *command, **_: next(
        (answer for part, answer in answers.items() if part in ' '.join(map(str, command))), 'yes'))
    monkeypatch.setattr(install, 'has_nvidia_driver', lambda: False)
    for name in ('MMCV', 'UV_TORCH_BACKEND'):
        monkeypatch.delenv(name, raising=False)
    return answers


def installed(env):
    """What was given to uv or pip to install, as one text."""
    return '\n'.join(line for line in env.ran if ' install ' in line)


def test_everything_of_the_extras_is_pinned_for_every_python():
    code = ('import setuptools, json, runpy; setuptools.setup = lambda **kw: print(json.dumps(kw['
            '"extras_require"])); runpy.run_path("setup.py")')
    extras = json.loads(subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True,
                                       capture_output=True, text=True).stdout)
    for stack, (constraints, extra, *_, minors) in install.STACKS.items():
        lines = (ROOT / 'requirements' / constraints).read_text().splitlines()
        pins = [Requirement(line) for line in lines if not line.startswith('#')]
        wanted = {Requirement(line).name.lower() for name in (extra, 'onnx', 'safetensors', 'test')
                  for line in extras[name]} | {'torch', 'uv', 'pip', 'opencv-python-headless'}
        for minor in minors:
            here = {'python_full_version': f'3.{minor}.1', 'python_version': f'3.{minor}'}
            pinned = {pin.name.lower() for pin in pins
                      if pin.marker is None or pin.marker.evaluate(here)}
            assert wanted <= pinned, (stack, minor, wanted - pinned)
            assert 'opencv-python' not in pinned


def test_the_stacks_share_no_package_of_openmmlab():
    """They have the same import names: one of each is all that an environment can hold."""
    def openmmlab(constraints):
        names = {line.partition('==')[0] for line in
                 (ROOT / 'requirements' / constraints).read_text().splitlines()}
        return {name for name in names if 'mm' in name.split('-')[-1][:2] or 'mmcv' in name
                or name.endswith(('openmim', 'onedl-mim'))}

    assert openmmlab('constraints.txt') == {
        'mmengine', 'mmcv-lite', 'mmdet', 'mmpretrain', 'mmsegmentation', 'openmim'}
    assert openmmlab('constraints-onedl.txt') == {f'onedl-{name}' for name in (
        'mmengine', 'mmcv', 'mmdetection', 'mmpretrain', 'mmsegmentation', 'mim')}


@pytest.mark.parametrize('content', ['pyvenv.cfg', 'notes.txt', 'bin/python'])
def test_what_it_did_not_make_is_left_alone(folder, content, answers):
    (folder / content).parent.mkdir(parents=True)
    (folder / content).write_text('mine')
    env = Recorded(folder)
    with pytest.raises(install.SetupError, match='was not made by this set-up'):
        env.set_up([])
    assert env.ran == []
    assert (folder / content).read_text() == 'mine'
    assert len(list(folder.rglob('*'))) == len(Path(content).parts)


@pytest.mark.parametrize('kind', ['a file', 'a link that leads nowhere'])
def test_what_is_no_folder_is_left_alone(folder, kind, answers):
    folder.write_text('mine') if kind == 'a file' else folder.symlink_to('gone')
    with pytest.raises(install.SetupError, match='was not made by this set-up'):
        Recorded(folder).set_up([])
    assert os.path.lexists(folder)


def finished(folder, stack='official', **facts):
    """The stamp of an environment that is ready."""
    folder.mkdir()
    env = Recorded(folder, stack)
    env.note(environment=f'{folder.resolve()} python3.11', stack=stack, extras=[], **facts)
    return env


def test_a_finished_environment_is_never_made_anew(folder, answers):
    answers['-m pip --version'] = None
    with pytest.raises(install.SetupError, match='its Python no longer starts'):
        finished(folder).set_up([])


def test_a_moved_environment_is_named(folder, tmp_path, answers):
    finished(folder).path.rename(tmp_path / 'elsewhere')
    with pytest.raises(install.SetupError, match=f'was moved: its programs name {folder}'):
        Recorded(tmp_path / 'elsewhere').set_up([])


@pytest.mark.parametrize(('made_for', 'asked'), [('official', 'onedl'), ('onedl', 'official')])
def test_one_environment_never_gets_both_stacks(folder, made_for, asked, answers):
    finished(folder, made_for)
    with pytest.raises(install.SetupError, match=f'holds the stack {made_for}'):
        Recorded(folder, asked).set_up([])


def test_a_ready_environment_is_used_whatever_python3_is_now(folder, answers, monkeypatch):
    """Also one of version 0.2.0, whose stamp names the version of its Python."""
    answers['sys.version_info'] = '3.9'
    folder.mkdir()
    monkeypatch.setattr(Recorded, 'install_mmcv', lambda self, kind: None)
    env = Recorded(folder)
    env.note(environment=f'{folder.resolve()} 3.11', stack='official')
    env.set_up([])
    assert env.ran[-1].endswith('orepa_mm.doctor')
    again = Recorded(folder)
    again.set_up([])
    assert again.ran == []
    again.set_up(['test'])
    assert '--extra=test' in installed(again)


def test_an_interrupted_set_up_goes_on_with_another_python(folder, answers):
    answers['-m pip --version'] = None
    (folder / 'bin').mkdir(parents=True)
    (folder / 'bin' / 'python').symlink_to('/gone')
    env = Recorded(folder)
    env.note(environment=f'{folder.resolve()} /gone', stack='official')
    env.create()
    assert env.ran == [f'{sys.executable} -m venv {folder}']
    assert not (folder / 'bin').exists()


@pytest.mark.parametrize(('stack', 'versions', 'fits'), [
    ('official', ['3.9', '3.14'], '3.14'), ('official', ['3.10', '3.14'], '3.10'),
    ('onedl', ['3.14', '3.13'], '3.13'), ('official', ['3.9', '3.15'], None)])
def test_which_python_is_taken(monkeypatch, stack, versions, fits):
    """The first is the one that runs, the second lies on PATH."""
    there = {sys.executable: versions[0], f'python{versions[1]}': versions[1]}
    monkeypatch.setattr(install, 'output', lambda python, *_: there.get(python))
    if fits is None:
        with pytest.raises(install.SetupError, match=r'Python 3.10 to 3.14 is needed'):
            install.find_python(install.STACKS[stack][-1])
    else:
        assert there[install.find_python(install.STACKS[stack][-1])] == fits


@pytest.mark.parametrize(('driver', 'asked', 'index', 'cuda', 'given'), [
    (False, None, 'answers', None, '--torch-backend auto'),
    (False, None, None, None, ''),
    (True, None, 'answers', '13.0', '--torch-backend auto'),
    (True, None, 'answers', 'None',
     '--torch-backend auto --reinstall-package torch --reinstall-package torchvision'),
    (True, None, None, 'None', '--reinstall-package torch --reinstall-package torchvision'),
    (True, 'cpu', None, 'None', '--torch-backend cpu'),
    (False, 'cu130', None, None, '--torch-backend cu130')])
def test_which_build_of_torch_is_asked_for(folder, answers, monkeypatch, driver, asked, index,
                                           cuda, given):
    answers |= {'--dry-run': index, 'torch.version.cuda': cuda}
    monkeypatch.setattr(install, 'has_nvidia_driver', lambda: driver)
    if asked:
        monkeypatch.setenv('UV_TORCH_BACKEND', asked)
    env = Recorded(folder)
    env.uv = Path('uv')
    env.install_torch()
    assert env.ran[0].partition('torch torchvision')[2].strip() == given


def test_a_driver_that_appears_has_torch_installed_anew(folder, answers, monkeypatch):
    """As from a login node to one with GPUs, whose home folder is the same."""
    env = Recorded(folder)
    monkeypatch.setattr(Recorded, 'install_mmcv', lambda self, kind: None)
    folder.mkdir()
    env.note(environment=f'{folder.resolve()} python3', stack='official')
    env.set_up([])
    answers['torch.version.cuda'] = 'None'
    again = Recorded(folder)
    again.set_up([])
    assert again.ran == []
    monkeypatch.setattr(install, 'has_nvidia_driver', lambda: True)
    again.set_up([])
    assert '--reinstall-package torch' in installed(again)


@pytest.mark.parametrize(('stack', 'there', 'kind', 'removed'), [
    ('official', None, 'lite', False), ('official', 'lite', 'lite', False),
    ('official', 'full', 'lite', True), ('official', 'lite', 'full', True),
    ('official', 'full', 'full', False), ('onedl', None, 'lite', False),
    ('onedl', 'full', 'lite', True)])
def test_mmcv_with_and_without_its_operators(folder, answers, tmp_path, stack, there, kind,
                                             removed):
    operators = tmp_path / 'mmcv' / '_ext.py'
    answers |= {'sysconfig': str(tmp_path), 'get_compiling_cuda_version':
                'yes' if there == 'full' else None}
    if there:
        operators.parent.mkdir()
    if there == 'lite':
        operators.write_text('of torchvision')
    env = Recorded(folder, stack)
    env.install = lambda *packages: operators.parent.mkdir(exist_ok=True)
    env.install_mmcv(kind)
    assert any('uninstall' in line for line in env.ran) == removed
    if kind == 'lite':
        assert operators.read_bytes() == install.OPERATORS.read_bytes()
    assert any('--no-binary' in line for line in env.ran) == (kind == 'full' and there != 'full')


def test_opencv_of_a_desktop_is_replaced(folder, answers, monkeypatch):
    monkeypatch.setattr(Recorded, 'install_mmcv', lambda self, kind: None)
    folder.mkdir()
    env = Recorded(folder)
    env.note(environment=f'{folder.resolve()} python3', stack='official')
    env.set_up([])
    assert 'uninstall -qy opencv-python opencv-python-headless' in '\n'.join(env.ran)
    assert '--no-deps opencv-python-headless' in installed(env)


def test_without_uv_pip_installs(folder, answers, monkeypatch, capsys):
    def run(self, *command, **variables):
        self.ran.append(' '.join(map(str, command)))
        if '--only-binary' in command:
            raise install.SetupError('no wheel')

    monkeypatch.setattr(Recorded, 'run', run)
    monkeypatch.setattr(Recorded, 'install_mmcv', lambda self, kind: None)
    folder.mkdir()
    env = Recorded(folder)
    env.note(environment=f'{folder.resolve()} python3', stack='official')
    env.set_up(['test'])
    assert 'there is no uv for this machine: pip goes on' in capsys.readouterr().out
    assert f'-e {ROOT}[openmmlab,onnx,safetensors,test]' in installed(env)
    assert 'uv pip' not in installed(env)


@pytest.mark.parametrize('settings', ["global.cert='/c.pem'\nglobal.index-url='file:///i'",
                                      ":env:.cert='/c.pem'\n:env:.index-url='file:///i'"])
def test_uv_gets_the_index_and_certificates_of_pip(folder, answers, monkeypatch, settings):
    monkeypatch.delenv('SSL_CERT_FILE', raising=False)
    monkeypatch.delenv('UV_DEFAULT_INDEX', raising=False)
    answers['config list'] = settings
    env = Recorded(folder)
    env.find_uv()
    assert env.variables['SSL_CERT_FILE'] == '/c.pem'
    assert env.variables['UV_DEFAULT_INDEX'] == 'file:///i'


def test_settings_that_send_packages_elsewhere_do_not_reach_pip(folder, monkeypatch, tmp_path):
    for name in ('USER', 'TARGET', 'PREFIX', 'ROOT', 'DRY_RUN', 'NO_DEPS'):
        monkeypatch.setenv(f'PIP_{name}', '1')
    out = tmp_path / 'variables'
    install.Environment(folder, 'official').run(
        sys.executable, '-c', f'import os; open({str(out)!r}, "w").write(repr(dict(os.environ)))')
    found = eval(out.read_text())
    assert found['PIP_USER'] == '0'
    assert not {'PIP_TARGET', 'PIP_PREFIX', 'PIP_ROOT', 'PIP_NO_DEPS', 'PIP_DRY_RUN'} & found.keys()


@pytest.mark.parametrize(('pip', 'index', 'said'), [
    ('yes', None, True), ('yes', 'yes', False), (None, None, False)])
def test_a_failure_without_a_network_says_so(folder, answers, pip, index, said):
    """Where there is no pip, it was `python -m venv` that failed, and says why."""
    answers |= {'pip index versions': index, 'pip --version': pip}
    with pytest.raises(install.SetupError) as error:
        install.Environment(folder, 'official').run(sys.executable, '-c', 'raise SystemExit(2)')
    assert ('The package index does not answer: there is no network' in str(error.value)) == said


@pytest.mark.parametrize(('arguments', 'folder'), [
    ([], '.venv'), (['--stack', 'onedl'], '.venv-onedl'), (['--venv', 'mine'], 'mine')])
def test_where_it_goes(arguments, folder, monkeypatch):
    found = []
    monkeypatch.setattr(install.Environment, 'set_up', lambda env, extras: found.append(env.path))
    monkeypatch.setattr(sys, 'argv', ['install.py', *arguments])
    assert install.main() == 0
    assert found == [install.ROOT / folder if folder != 'mine' else Path('mine')]


def test_wrong_words(monkeypatch, capsys, folder, answers):
    monkeypatch.setattr(sys, 'argv', ['install.py', '--stack', 'openmmlab'])
    with pytest.raises(SystemExit):
        install.main()
    assert "invalid choice: 'openmmlab'" in capsys.readouterr().err
    monkeypatch.setenv('MMCV', 'half')
    with pytest.raises(install.SetupError, match='MMCV=half is neither full nor lite'):
        Recorded(folder).set_up([])
