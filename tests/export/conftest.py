"""What the tests of converting checkpoint files share."""

import runpy
import sys

import pytest
import torch
from helpers import ROOT


@pytest.fixture
def saved(tmp_path):
    """Write a checkpoint file."""
    def save(checkpoint, name='source.pth'):
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name
    return save


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the tool; gives its exit code, standard output and standard error."""
    def run(*arguments):
        tool = str(ROOT / 'tools' / 'convert_checkpoint.py')
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(tool, run_name='__main__')
        return exit_info.value.code, *capsys.readouterr()
    return run
