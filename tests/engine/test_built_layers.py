"""How many convolutions are re-parameterizable, on what stock modules build."""

import pytest
from helpers import on_meta_device
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from orepa_mm.engine.built_layers import describe_layers, log_built_layers
from orepa_mm.layers import DBBConv2d, OREPAConv2d, OREPAStemConv2d

OREPA = dict(type='OREPA')
HEAD = dict(type='FCNHead', in_channels=64, channels=8, num_classes=2, num_convs=1,
            concat_input=False)
NORM = dict(type='BN')
RESNET = dict(type='ResNet', depth=18, norm_cfg=NORM)
BISENET = dict(type='BiSeNetV2', norm_cfg=NORM, conv_cfg=OREPA)


@pytest.fixture
def log():
    """Builds a segmentor; what was logged then, and at which level."""
    lines = []
    logger = MMLogger.get_instance('built', logger_name='built')
    logger.addFilter(lambda record: lines.append((record.levelname, record.getMessage())))

    def build(backbone, head=HEAD, **kwargs):
        init_default_scope('mmseg')
        cfg = dict(type='EncoderDecoder', backbone=dict(backbone), decode_head=dict(head), **kwargs)
        with on_meta_device():
            model = MODELS.build(cfg)
        lines.clear()
        log_built_layers(model, cfg)
        return model, list(lines)

    return build


def counted(model):
    """All convolutions, by the names of their classes; for models without a stem of ours."""
    return sum(type(module).__name__ in ('Conv2d', 'OREPAConv2d') for module in model.modules())


def test_a_stock_module_that_does_not_use_its_conv_cfg(log):
    model, lines = log(BISENET)
    total = counted(model.backbone)
    assert total == 54
    (level, line), (warned, warning) = lines
    assert (level, warned) == ('INFO', 'WARNING')
    assert line == f'0 of {counted(model)} convolutions are re-parameterizable'
    assert 'in model.backbone, but BiSeNetV2 built none' in warning
    assert f'(0 of {total} convolutions' in warning


def test_one_part_does_not_hide_the_other(log):
    model, lines = log(BISENET, {**HEAD, 'conv_cfg': OREPA})
    (_, line), (level, warning) = lines
    # the last 1 x 1 of a head, which predicts, takes no conv_cfg
    assert line.startswith(f'1 of {counted(model)} convolutions are re-parameterizable: '
                           '1 OREPAConv2d; left plain: ')
    assert line.endswith('1 in decode_head')
    assert level == 'WARNING'
    assert 'model.backbone' in warning


@pytest.mark.parametrize(('backbone', 'built', 'left'), [
    (dict(RESNET, conv_cfg=OREPA), '16 OREPAConv2d, 3 OREPAConv1x1, 1 OREPAStemConv2d', ''),
    # as the authors', our ResNet leaves the shortcuts of a BasicBlock plain
    (dict(RESNET, type='OREPAResNet'), '16 OREPAConv2d, 1 OREPAStemConv2d', '3 in backbone, '),
    (dict(RESNET, type='mmseg.OREPAResNet'), '16 OREPAConv2d, 1 OREPAStemConv2d',
     '3 in backbone, '),
])
def test_resnet_builds_them(log, backbone, built, left):
    """ResNet-18 has 20: the stem, 16 in 8 blocks, 3 shortcuts. The head has 2."""
    _, lines = log(backbone)
    assert lines == [('INFO', f'{17 if left else 20} of 22 convolutions are re-parameterizable: '
                      f'{built}; left plain: {left}2 in decode_head')]


@pytest.mark.parametrize('backbone', [RESNET, dict(RESNET, type='OREPAResNet', deploy=True)])
def test_plain_models_are_not_warned_of(log, backbone):
    assert log(backbone)[1] == [('INFO', '0 of 22 convolutions are re-parameterizable')]


def test_our_backbone_built_with_other_convolutions_is_warned_of(log):
    _, (_, (level, warning)) = log(dict(RESNET, type='OREPAResNet', conv_cfg=dict(type='Conv2d')))
    assert level == 'WARNING'
    assert 'in model.backbone, but OREPAResNet built none' in warning


def test_lists_and_what_is_no_part_of_the_model(log):
    heads = [dict(HEAD, in_channels=64, conv_cfg=OREPA), dict(HEAD)]
    assert len(log(RESNET, auxiliary_head=heads)[1]) == 1
    _, (_, (level, warning)) = log(RESNET, train_cfg=dict(student=dict(conv_cfg=OREPA)))
    assert level == 'WARNING'
    assert 'the model (because of model.train_cfg), but EncoderDecoder built none' in warning


def test_what_a_layer_is_made_of_does_not_count():
    model = nn.Sequential(DBBConv2d(4, 4, 3, padding=1), OREPAConv2d(4, 4, 3),
                          OREPAStemConv2d(3, 4, 7), nn.Conv2d(4, 4, 1))
    model.append(model[1])  # shared
    assert describe_layers(model) == (
        '3 of 4 convolutions are re-parameterizable: 1 DBBConv2d, 1 OREPAConv2d, '
        '1 OREPAStemConv2d; left plain: 1 in 3')
    assert describe_layers(nn.Linear(2, 2)) == '0 of 0 convolutions are re-parameterizable'
