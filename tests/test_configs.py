"""Every config of the project, by being there."""

import pytest
import torch
import yaml
from helpers import ROOT
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config

from orepa_mm.deploy import deploy_config, is_training_form, reparameterize

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py')
                 if path.parent.name != '_base_')
STOCK = {'faster-rcnn_orepa-r50_fpn_1x_coco': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'}


@pytest.fixture(autouse=True)
def _mmdet_scope():
    register_all_modules(init_default_scope=True)


def test_names_are_unique_for_mim():
    names = [path.name for path in (ROOT / 'configs').rglob('*.py')]
    assert len(names) == len(set(names))
    assert CONFIGS


def test_metafiles_list_every_config():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [model for file in index['Import']
              for model in yaml.safe_load((ROOT / file).read_text())['Models']]
    assert sorted(model['Config'] for model in models) == [
        str(path.relative_to(ROOT)) for path in CONFIGS]
    assert all(ROOT.joinpath(model['Config']).stem == model['Name'] for model in models)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds_and_deploys_to_a_stock_model(path):
    cfg = Config.fromfile(path)
    stock = deploy_config(cfg)
    assert 'orepa' not in stock.pretty_text.lower()
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        deployed = MODELS.build(stock.model)
    assert is_training_form(model)
    with torch.no_grad():
        converted = reparameterize(model)
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in deployed.state_dict().items()}


@pytest.mark.parametrize('name', STOCK)
def test_differs_from_the_stock_config_in_the_backbone_only(name):
    ours = Config.fromfile(next(path for path in CONFIGS if path.stem == name)).to_dict()
    theirs = get_config(f'mmdet::{STOCK[name]}').to_dict()
    assert ours.pop('custom_imports')['imports'] == ['orepa_mm']
    assert ours['model'].pop('backbone')['type'] == 'OREPAResNet'
    theirs['model'].pop('backbone')
    assert _without_scope(ours) == _without_scope(theirs)


def _without_scope(value):
    """MMEngine notes the scope in what comes from another package's config."""
    if isinstance(value, dict):
        return {k: _without_scope(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [_without_scope(v) for v in value]
    return value
