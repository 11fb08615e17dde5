"""Every tool on what it cannot use: exit code 1, one line that names it, nothing written.

What it says of each kind of checkpoint is in test_checkpoint_files.py: here is one of each sort.
"""

import os
import resource
import subprocess
import sys

import damage
import pytest
from damage import contents
from helpers import ROOT, exit_code, run_each

#: How each tool takes a checkpoint; `out` is a folder that is not there.
TOOLS = {
    'convert_checkpoint': lambda room, path, out: [path, out / 'x.pth'],
    'convert_checkpoint --to deploy': lambda room, path, out: [
        path, out / 'x.pth', '--to', 'deploy'],
    'expand': lambda room, path, out: [room.config, path, out / 'x.pth', '--no-images'],
    'reparam': lambda room, path, out: [room.config, path, '--out', out, '--skip-test'],
    'test': lambda room, path, out: [room.config, path, '--out', out / 'x.pkl'],
    'predict': lambda room, path, out: [room.config, path, room.folder / 'data/val', '--out', out],
    'benchmark': lambda room, path, out: [
        room.config, path, '--out', out, '--shape', 1, 3, 32, 32, '--rounds', 1],
    'branch_similarity': lambda room, path, out: [room.config, path, '--out', out],
    'train --resume': lambda room, path, out: [room.config, '--resume', path],
}
#: The files that they are given: kind, and from which weights.
FILES = {
    'a flipped bit': lambda room, ran: damage.not_checkpoints(room.content, room.state)[
        'flipped bit 0'],
    'code': lambda room, ran: damage.crafted(ran)['zip'],
    'NaN': lambda room, ran: damage.saved(
        {'state_dict': damage.wrong_weights(room.state)['NaN'], 'meta': {}}),
    'a number for a key': lambda room, ran: damage.saved(
        {'state_dict': damage.wrong_weights(room.state)['a number for a key'], 'meta': {}}),
    'words for meta': lambda room, ran: damage.saved({'state_dict': room.state, 'meta': 'mine'}),
    'nothing': lambda room, ran: damage.saved({}),
}
#: Which are refused by others than our own readers, or are no mistake there.
ELSEWHERE = {('train --resume', kind) for kind in ('NaN', 'words for meta', 'nothing')}
PAIRS = [(tool, kind) for tool in TOOLS for kind in FILES if (tool, kind) not in ELSEWHERE]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')


@pytest.fixture
def called(room, tmp_path, capsys):
    """Runs a tool with the data of the room; exit code, and what it says on stderr."""
    def call(tool, *words):
        name, *options = tool.split()
        if words and words[0] == room.config:
            words = [*words, '--data-root', room.folder / 'data']
            if name not in ('predict',):
                words += ['--work-dir', tmp_path / 'work']
        capsys.readouterr()
        code = exit_code(f'tools/{name}.py', *words, *options)
        return code, capsys.readouterr().err
    return call


def require_one_line(outcome, *named):
    code, said = outcome
    lines = [line for line in said.splitlines() if line.startswith('error: ')]
    assert code == 1, said
    assert len(lines) == 1, said
    assert 'Traceback' not in said
    assert 'weights_only' not in said
    for name in named:
        assert str(name) in lines[0], lines[0]


@pytest.mark.parametrize(('tool', 'kind'), PAIRS)
def test_checkpoints(tool, kind, room, called, nothing_changes):
    path, out = nothing_changes / 'a mo del é 模.pth', nothing_changes / 'out'
    path.write_bytes(FILES[kind](room, nothing_changes / 'ran'))
    content = path.read_bytes()
    words = TOOLS[tool](room, path, out)
    require_one_line(called(tool.replace(' --resume', ''), *words), path.name)
    assert path.read_bytes() == content
    assert not out.exists()
    assert not (nothing_changes / 'ran').exists()


def test_training_does_not_start_from_lost_weights(room, called, nothing_changes):
    path = nothing_changes / 'lost weights.pth'
    path.write_bytes(FILES['NaN'](room, None))
    require_one_line(called('train', room.config, '--cfg-options', f'load_from={path}'),
                     path, 'the weights that the training starts from', 'are not finite')
    assert not list(nothing_changes.rglob('iter_*'))


@pytest.mark.parametrize('tool', ['convert_checkpoint', 'expand', 'test', 'reparam'])
def test_no_input_is_overwritten(tool, room, called, nothing_changes):
    """The output is the input, by its name, by a link to it, or by another way there."""
    content = damage.saved({'state_dict': room.plain if tool == 'expand' else room.state})
    path, link = nothing_changes / 'model.pth', nothing_changes / 'link.pth'
    path.write_bytes(content)
    link.symlink_to(path)
    for out in (path, link, nothing_changes / 'here' / '..' / 'model.pth'):
        words = {'convert_checkpoint': [path, out],
                 'expand': [room.config, path, out, '--no-images'],
                 'test': [room.config, path, '--show-dir', out],
                 'reparam': [room.config, path, '--out', out, '--skip-test']}[tool]
        require_one_line(called(tool, *words), out.name)
        assert path.read_bytes() == content
        assert link.is_symlink()


def test_links_to_themselves(room, called, nothing_changes):
    itself = nothing_changes / 'itself'
    itself.symlink_to(itself)
    good = nothing_changes / 'good.pth'
    good.write_bytes(room.content)
    for tool, words in (
            ('convert_checkpoint', [itself, nothing_changes / 'x.pth']),
            ('convert_checkpoint', [good, itself / 'x.pth']),
            ('expand', [itself, good, nothing_changes / 'x.pth']),
            ('branch_similarity', [room.config, itself]),
            ('branch_similarity', [room.config, good, '--out', itself]),
            ('predict', [itself, itself, '--out', nothing_changes / 'out']),
            ('check_data', [room.config, '--json', itself / 'x.json']),
            ('report', [itself, itself])):
        require_one_line(called(tool, *words), 'itself')
    assert contents(nothing_changes).keys() == {'itself', 'good.pth'}


def limited(limit, *commands):
    """Run tools in a process of its own that is limited first; exit code and output of each."""
    return run_each(*commands, preexec_fn=limit, env={
        **os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'})


def test_a_disk_that_is_full(room, nothing_changes):
    """No file may become larger than 20 kB: what a full disk says, without one."""
    path, out = nothing_changes / 'good.pth', nothing_changes / 'o ut' / 'x.pth'
    path.write_bytes(room.content)
    (nothing_changes / 'plain.pth').write_bytes(damage.saved({'state_dict': room.plain}))
    before = contents(nothing_changes)
    outcomes = limited(
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)),
        ['tools/convert_checkpoint.py', path, out, '--to', 'deploy'],
        ['tools/expand.py', room.config, nothing_changes / 'plain.pth', out, '--no-images',
         '--work-dir', nothing_changes / 'work'])
    for outcome in outcomes:
        require_one_line(outcome, out, 'free some space, or write elsewhere')
    assert {name: value for name, value in contents(nothing_changes).items()
            if not name.startswith('work')} == before


def test_files_and_folders_that_may_not_be_read_or_written(room, nothing_changes):
    """The superuser may do anything: he becomes another user for this."""
    secret, closed = nothing_changes / 'secret.pth', nothing_changes / 'closed'
    secret.write_bytes(room.content)
    secret.chmod(0)
    closed.mkdir(mode=0o555)
    good = nothing_changes / 'good.pth'
    good.write_bytes(room.content)
    for folder in (nothing_changes, *nothing_changes.parents):  # pytest's own are closed to others
        if os.access(folder, os.W_OK) and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    nothing_changes.chmod(0o777)  # so that the secret file is what stands in the way

    def become_another():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    def can_run():
        try:
            return subprocess.run([sys.executable, '-c', 'import torch'], cwd=ROOT,
                                  preexec_fn=become_another, capture_output=True).returncode == 0
        except PermissionError:
            return False

    if os.geteuid() == 0 and not can_run():
        pytest.skip('another user may not read this environment, so that no tool can be called')
    outcomes = limited(
        become_another,
        ['tools/convert_checkpoint.py', secret, nothing_changes / 'new' / 'x.pth'],
        ['tools/convert_checkpoint.py', good, closed / 'x.pth'],
        ['tools/convert_checkpoint.py', good, closed / 'new' / 'x.pth'],
        ['tools/report.py', closed, closed, '--out', closed / 'x.html'],
        ['tools/make_shapes.py', closed / 'new'])
    for outcome, named in zip(outcomes, (secret, *[closed] * 4)):
        require_one_line(outcome, named)
        assert 'choose another path' in outcome[1]
    assert contents(closed) == {}
    assert not (nothing_changes / 'new').exists()
