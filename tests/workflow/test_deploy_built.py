"""What is verified is the network that the written config and checkpoint build."""


import pytest
import torch
from helpers import ROOT, relative_error, vary_scales
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny_runs import config

from orepa_mm.checkpoints import load_weights
from orepa_mm.datasets import make_shapes_imagenet
from orepa_mm.errors import VerificationError
from orepa_mm.workflow import deploy as pipeline
from orepa_mm.workflow import reparameterize_checkpoint
from orepa_mm.workflow.evidence import built_model


def deploy(folder, out):
    return reparameterize_checkpoint(config(folder), folder / 'iter_5.pth', out, test=False,
                                     num_images=2, latency_rounds=1)


EFFICIENT_NET = f'''
_base_ = '{ROOT}/configs/imagenet/orepa-resnet18-light_300i_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='EfficientNet', arch='b0', conv_cfg=dict(type='OREPA')),
    head=dict(in_channels=1280))
test_dataloader = dict(num_workers=0, persistent_workers=False)
'''


@pytest.fixture(scope='module')
def efficient_net(tmp_path_factory):
    """A stock network that has another conv layer by default, with OREPA layers in it."""
    folder = tmp_path_factory.mktemp('efficient_net')
    make_shapes_imagenet(folder / 'data', 12, 12, 32)
    (folder / 'config.py').write_text(EFFICIENT_NET)
    torch.manual_seed(0)
    model = MODELS.build(config(folder).model)
    model.init_weights()
    vary_scales(model)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    torch.save({'state_dict': model.state_dict()}, folder / 'iter_5.pth')
    return folder, model.eval()


def test_what_is_verified_is_what_the_files_build(efficient_net):
    folder, before = efficient_net
    report = deploy(folder, folder / 'out')
    assert report['verification']['complete']
    cfg = Config.fromfile(folder / 'out' / 'config.py')
    assert cfg.model.backbone.conv_cfg is None
    after = MODELS.build(cfg.model).eval()
    checkpoint = load_weights(after, folder / 'out' / 'model.pth')
    # the checkpoint of the training form had none: those of the data set
    assert checkpoint['meta']['dataset_meta']['classes'][:2] == ('circle_plain', 'circle_striped')
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(after(x)[0], before(x)[0]) < 1e-4


def test_a_config_that_builds_another_network_is_refused(efficient_net, monkeypatch):
    """Its weights load strictly: without `conv_cfg` the padding is another one."""
    def without_conv_cfg(cfg, form):
        cfg = deploy_config(cfg, form)
        del cfg.model.backbone['conv_cfg']
        return cfg

    deploy_config = pipeline.deploy_config
    monkeypatch.setattr(pipeline, 'deploy_config', without_conv_cfg)
    folder, _ = efficient_net
    with pytest.raises(VerificationError, match=r'(?s)does not compute the same function.*'
                       r'starts in the layer backbone\.layers\.0\.conv'):
        deploy(folder, folder / 'wrong')
    assert not (folder / 'wrong').exists()


def test_a_preprocessor_beside_the_model_belongs_to_it():
    """MMPretrain's place for it: what is exported tells mean and std of it."""
    cfg = Config(dict(default_scope='mmpretrain', data_preprocessor=dict(
        type='ClsDataPreprocessor', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], num_classes=2),
        model=dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18))))
    assert built_model(cfg).data_preprocessor.mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert 'data_preprocessor' not in cfg.model
