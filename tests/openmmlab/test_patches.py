"""What is put in place of names of others."""

import pkgutil
import sysconfig

import pytest
from mmengine.runner import runner
from mmengine.utils.dl_utils import collect_env

from orepa_mm.openmmlab.patches import patch


def test_a_dropped_name_is_there_again(monkeypatch):
    monkeypatch.delattr(pkgutil, 'find_loader', raising=False)
    patch()
    assert pkgutil.find_loader('json').name == 'json'
    assert pkgutil.find_loader('no_such_module') is None
    assert 'PyTorch' in collect_env()


@pytest.mark.parametrize('compiler', ['no-such-compiler-gcc -pthread', None])
def test_a_missing_compiler_says_nothing_into_the_log(monkeypatch, capfd, compiler):
    if compiler:
        monkeypatch.setitem(sysconfig.get_config_vars(), 'CC', compiler)
    before = sysconfig.get_config_var('CC')
    found = runner.collect_env()
    assert capfd.readouterr().err == ''
    assert found['GCC'] == 'n/a' if compiler else found['GCC']
    assert sysconfig.get_config_var('CC') == before


def test_a_second_call_changes_nothing():
    before = runner.collect_env
    patch()
    assert runner.collect_env is before
