"""How tools end: one line for what a user can mend, a traceback for what he cannot."""

import errno
import os
import subprocess
import sys

import mmengine.model  # noqa: F401  registers what is built here
import pytest
from helpers import ROOT, run_each
from mmengine.registry import MODELS

from orepa_mm import errors
from orepa_mm.errors import ConfigError, UserError, explained, run_tool


def ended(capsys, main, *more):
    """Exit code of a tool, and what it says on stderr."""
    with pytest.raises(SystemExit) as stop:
        run_tool(main, *more)
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error
    return main


def test_every_error_of_ours_is_a_users():
    own = [value for value in vars(errors).values()
           if isinstance(value, type) and issubclass(value, Exception)]
    assert len(own) > 6
    assert all(issubclass(error, UserError) for error in own)


@pytest.mark.parametrize(('error', 'line'), [
    (ConfigError('this and that'), 'this and that'),
    (ModuleNotFoundError("No module named 'x'"), "No module named 'x'"),
    (FileNotFoundError('there is no x'), 'there is no x'),
    (OSError(errno.ENOSPC, 'No space left on device', '/a b/c'),
     '/a b/c: no space left on device; free some space, or write elsewhere'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'a file could not be read or written: '
     'no space left on device; free some space, or write elsewhere'),
    (PermissionError(errno.EACCES, 'Permission denied', b'/x'),
     '/x: permission denied; change its permissions, or choose another path'),
    (OSError(errno.EIO, 'Input/output error', 'x'), 'x: input/output error'),
])
def test_one_line_of_what_a_user_can_mend(capsys, error, line):
    assert ended(capsys, raising(error)) == (1, f'error: {line}\n')


def test_codes(capsys):
    assert ended(capsys, lambda: None) == (0, '')
    assert ended(capsys, lambda: 3) == (3, '')
    assert ended(capsys, raising(KeyboardInterrupt())) == (130, '\nstopped\n')
    assert ended(capsys, raising(ValueError('seed')), ValueError) == (1, 'error: seed\n')


@pytest.mark.parametrize('error', [ValueError('x'), KeyError('x'), TypeError(
    '__init__() got an unexpected keyword argument'), RuntimeError('x')])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_tool(raising(error))


@pytest.mark.parametrize(('cfg', 'words'), [
    (dict(type='NoSuchThing'), 'NoSuchThing is not in the'),
    (dict(type='BaseDataPreprocessor', nonblocking=True), "unexpected keyword argument 'nonbl"),
    (dict(type='ExponentialMovingAverage'), 'missing 1 required positional argument'),
])
def test_a_config_whose_object_cannot_be_built(capsys, cfg, words):
    code, said = ended(capsys, lambda: MODELS.build(cfg))
    assert code == 1
    assert words in said
    assert said.count('\n') == 1


def test_who_reads_only_the_beginning_sees_no_error():
    script = ("from errors import run_tool\n"  # not through the package, which takes seconds
              "run_tool(lambda: [print('x' * 99) for _ in range(9999)] and 0)")
    reading, writing = os.pipe()
    tool = subprocess.Popen([sys.executable, '-c', script], cwd=ROOT / 'orepa_mm', stdout=writing,
                            stderr=subprocess.PIPE)
    os.close(writing)
    os.close(reading)
    assert tool.communicate()[1] == b''
    assert tool.returncode == 1


def test_text_of_keys():
    assert explained(KeyError('a key')) == 'a key'


def test_every_tool_notices_what_it_cannot_write_before_it_begins(tmp_path):
    """None of what they would read is there: they fail at the output first, and leave nothing."""
    (tmp_path / 'file').touch()
    there = tmp_path / 'file'
    below = there / 'out'
    lines = [
        ['benchmark', 'no.py', '--out', there], ['benchmark', 'theory', '--out', below],
        ['branch_similarity', 'no.py', 'no.pth', '--out', below],
        ['check_data', 'no.py', '--json', tmp_path], ['check_data', 'no.py', '--json', below],
        ['compare', 'no.py', '--out', there],
        ['compare', 'no.py', '--out', tmp_path / 'new', '--into', below],
        ['convert_checkpoint', 'no.pth', below], ['expand', 'no.py', 'no.pth', below],
        ['make_shapes', below], ['predict', 'no.py', 'no.pth', 'no.jpg', '--out', there],
        ['report', 'no', 'no', '--out', below],
        ['test', 'no.py', 'no.pth', '--out', tmp_path / 'file' / 'x.pkl'],
        ['test', 'no.py', 'no.pth', '--show-dir', below]]
    for line, (code, said) in zip(lines, run_each(*(
            [f'tools/{tool}.py', *words] for tool, *words in lines))):
        assert code == 1, line
        assert said.startswith('error: '), (line, said)
        assert said.count('\n') == 1
        assert str(tmp_path) in said
        assert 'choose another path' in said
    assert list(tmp_path.iterdir()) == [there]
