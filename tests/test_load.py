"""`orepa_mm.load`: the model of a folder that `reparam` wrote."""

import pytest
import torch
from helpers import ROOT, relative_error, vary_scales
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain import ImageClassificationInferencer

import orepa_mm
from orepa_mm.errors import CheckpointError, ConfigError
from orepa_mm.export import deploy_config, save_deployed
from orepa_mm.layers import reparam_layers
from orepa_mm.workflow.evidence import built_model

CONFIG = ROOT / 'configs/imagenet/orepa-resnet18-light_300i_in1k.py'
CHANGES = {'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8,
           'model.head.in_channels': 64, 'model.head.num_classes': 3}


@pytest.fixture
def trained():
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(CHANGES)
    init_default_scope(cfg.default_scope)
    model = built_model(cfg)
    vary_scales(model)
    return cfg, model.eval()


def deployed(trained, folder, form='plain'):
    cfg, model = trained
    save_deployed(orepa_mm.reparameterize(model, fold_bn=form == 'folded'),
                  deploy_config(cfg, form), folder,
                  {'form': form, 'dataset_meta': {'classes': ('a', 'b', 'c')}})
    return folder


@pytest.mark.parametrize('form', ['plain', 'folded'])
def test_it_computes_what_the_training_form_does(form, trained, tmp_path):
    model = orepa_mm.load(deployed(trained, tmp_path / form, form))
    assert not model.training
    assert not list(reparam_layers(model))
    assert model.dataset_meta == {'classes': ('a', 'b', 'c')}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(model(x)[0], trained[1](x)[0]) < 1e-4
    # MMPretrain's own inferencer takes it
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    assert ImageClassificationInferencer(model)(image)[0]['pred_class'] in ('a', 'b', 'c')


def test_what_is_refused(trained, tmp_path):
    folder = deployed(trained, tmp_path / 'deployed')
    with pytest.raises(FileNotFoundError, match=r'there is no folder .*nowhere'):
        orepa_mm.load(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match=r'there is no folder .*model\.pth'):
        orepa_mm.load(folder / 'model.pth')
    weights, text = (folder / 'model.pth').read_bytes(), (folder / 'config.py').read_text()
    (folder / 'model.pth').write_bytes(weights[:-1000])
    with pytest.raises(CheckpointError, match=r'model\.pth'):
        orepa_mm.load(folder)
    torch.save({'state_dict': trained[1].state_dict()}, folder / 'model.pth')
    with pytest.raises(CheckpointError, match='training form, but the model is in plain form'):
        orepa_mm.load(folder)
    (folder / 'model.pth').write_bytes(weights)
    (folder / 'config.py').write_text(text[:len(text) // 2])
    with pytest.raises(ConfigError, match=r'config\.py cannot be read'):
        orepa_mm.load(folder)
    (folder / 'config.py').write_text("default_scope = 'mmpretrain'")
    with pytest.raises(ConfigError, match='names no model'):
        orepa_mm.load(folder)
    (folder / 'config.py').unlink()
    with pytest.raises(FileNotFoundError, match=r'has no config\.py: it is no folder'):
        orepa_mm.load(folder)
