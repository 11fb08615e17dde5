import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quick_start  # noqa: F401  # before what it changes is used


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def _no_default_scope_of_another_file():
    """As below, for what is built once for a whole file, before its first test."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(DefaultScope, '_instance_dict', type(DefaultScope._instance_dict)())
        yield


@pytest.fixture(autouse=True)
def _no_default_scope_and_no_logger(monkeypatch):
    """A scope that another test left behind would decide which package's class is built.

    A logger would write into that test's captured, closed output.
    """
    for kind in (DefaultScope, MMLogger):
        monkeypatch.setattr(kind, '_instance_dict', type(kind._instance_dict)())
