"""A tiny classifier in a folder of its own, and the tools that are called on files beside it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from damage import contents, saved
from helpers import ROOT, vary_scales
from hypothesis.configuration import set_hypothesis_home_dir
from mmengine.registry import DefaultScope

from orepa_mm.datasets import make_shapes_imagenet
from orepa_mm.engine import read_config
from orepa_mm.export import deploy_config, save_deployed
from orepa_mm.reparam import reparameterize
from orepa_mm.workflow.evidence import built_model

# else a folder would appear in the project's
set_hypothesis_home_dir(Path(tempfile.gettempdir(), 'orepa_mm-hypothesis'))

CONFIG = f'''
_base_ = '{ROOT}/configs/imagenet/orepa-resnet18-light_300i_in1k.py'
model = dict(backbone=dict(base_channels=8, stem_channels=32),
             head=dict(in_channels=64, num_classes=3, topk=(1,)))
train_cfg = dict(max_iters=1)
train_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
'''


@dataclass
class Room:
    """What the tests share; nothing in `folder` may change.

    Attributes:
        folder: With `config.py`, `data/` and `deployed/`.
        model: Of the config, in training form.
        state: Its weights.
        plain: The same, re-parameterized.
        content: Of its checkpoint file.
    """

    folder: Path
    model: torch.nn.Module
    state: dict
    plain: dict
    content: bytes

    @property
    def config(self):
        return self.folder / 'config.py'


@pytest.fixture(scope='session')
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp('a room')
    make_shapes_imagenet(folder / 'data', 12, 12, 32)
    (folder / 'config.py').write_text(CONFIG)
    cfg = read_config(folder / 'config.py')
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = built_model(cfg)
        vary_scales(model)
        plain = reparameterize(model.eval())
        save_deployed(plain, deploy_config(cfg), folder / 'deployed', {'form': 'plain'})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return Room(folder, model, state, dict(plain.state_dict()), saved({'state_dict': state}))


@pytest.fixture
def nothing_changes(room, tmp_path):
    """After the test all inputs are as they were, and no output is there."""
    before = contents(room.folder)
    yield tmp_path
    assert contents(room.folder) == before
    assert not [path for path in tmp_path.rglob('*') if '.new-' in path.name]
