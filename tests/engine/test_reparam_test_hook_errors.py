"""Validation with the deployed form: whatever is wrong is said loudly, and costs nothing."""

import pytest
import torch
from helpers import randomize
from mmengine.hooks import EMAHook, Hook
from small_run import EMA, OURS, Net, build, log_of, predictions, recorded
from torch import nn

from orepa_mm.engine import reparam_test_hook
from orepa_mm.engine.reparam_test_hook import ReparamTestHook
from orepa_mm.errors import ConfigError, NothingToConvertError, VerificationError
from orepa_mm.reparam import is_training_form, reparameterize


@pytest.fixture
def wrong_conversion(monkeypatch):
    def broken(model):
        model = reparameterize(model)
        with torch.no_grad():
            model.backbone[4].weight.mul_(1.5)
        return model

    monkeypatch.setattr(reparam_test_hook, 'reparameterize', broken)


def test_a_difference_is_logged_and_training_goes_on(tmp_path, wrong_conversion):
    runner = build(tmp_path, OURS)
    runner.train()
    assert runner.epoch == 2
    errors = log_of(tmp_path, 'ERROR')
    assert len(errors) == 2
    assert 'THE DEPLOYED FORM DIFFERS from the training form on batch 0' in errors[0]
    assert 'backbone in float32: ' in errors[0]
    assert 'starts in the layer backbone.4' in errors[0]


def test_a_difference_stops(tmp_path, wrong_conversion):
    runner = build(tmp_path, dict(OURS, stop_on_difference=True))
    model = runner.model
    with pytest.raises(VerificationError, match='backbone in float32'):
        runner.train()
    assert runner.model is model
    assert (tmp_path / 'epoch_1.pth').is_file()


def test_a_comparison_that_fails_is_loud_and_costs_nothing(tmp_path, monkeypatch):
    def impossible(*args):
        raise TypeError('no such input')

    monkeypatch.setattr(reparam_test_hook, 'verify', impossible)
    runner = build(tmp_path / 'on', OURS)
    runner.train()
    assert runner.epoch == 2
    error, _ = log_of(tmp_path / 'on', 'ERROR')
    assert 'COULD NOT BE COMPARED' in error
    assert 'TypeError: no such input' in error
    assert 'Traceback' in error
    with pytest.raises(VerificationError, match='no such input'):
        build(tmp_path / 'stop', dict(OURS, stop_on_difference=True)).train()


class Interrupter(Hook):
    def __init__(self, method):
        setattr(self, method, self.interrupt)
        self.on = True

    def interrupt(self, runner, *args, **kwargs):
        if self.on:
            raise KeyboardInterrupt


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'LOWEST'])
@pytest.mark.parametrize('method', ['before_val_epoch', 'after_val_iter', 'after_val_epoch'])
def test_an_interrupted_validation_leaves_the_training_form(tmp_path, method, priority):
    interrupter = Interrupter(method)
    interrupter.priority = priority
    runner = build(tmp_path, OURS, interrupter)
    model = runner.model
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert runner.model is model
    assert is_training_form(model)
    interrupter.on = False
    runner.train()  # goes on
    assert runner.model is model
    assert runner.epoch == 2


@pytest.mark.parametrize(('hooks', 'message'), [
    ([dict(OURS), dict(EMA, priority='LOWEST')],
     r"EMAHook \(priority LOWEST\) runs after ReparamTestHook.*Give the EMAHook.*'NORMAL'"),
    ([dict(OURS), dict(EMA, priority='LOW')], 'EMAHook .* runs after'),
    ([dict(EMA), dict(OURS, priority='VERY_HIGH')], "ReparamTestHook one that comes later"),
    ([dict(OURS, priority='LOWEST')],
     r'CheckpointHook \(priority VERY_LOW\) runs before ReparamTestHook.*save_best'),
    ([OURS, OURS], 'two ReparamTestHooks'),
])
@pytest.mark.parametrize('run', ['train', 'val', 'test'])
def test_hooks_in_a_wrong_order(tmp_path, hooks, message, run):
    with pytest.raises(ConfigError, match=message):
        getattr(build(tmp_path, *hooks), run)()
    assert not list(tmp_path.glob('*.pth'))


def test_equal_priorities_in_the_right_order(tmp_path):
    build(tmp_path, dict(EMA, priority='LOW'), OURS).test()


class TwiceEMAHook(EMAHook):
    """As MMPretrain's, which validates with both kinds of weights."""

    evaluate_on_ema = evaluate_on_origin = True


def test_a_second_validation_inside_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='evaluate_on_origin=False'):
        build(tmp_path, TwiceEMAHook(), OURS).train()


def test_nothing_to_convert_is_said_before_training(tmp_path):
    runner = build(tmp_path, OURS, model=Net(nn.Conv2d, nn.Conv2d))
    with pytest.raises(NothingToConvertError, match='no OREPA or DBB layer'):
        runner.train()
    assert runner.iter == 0


def test_a_deployed_model_is_left_alone(tmp_path):
    model = reparameterize(randomize(Net()))
    runner = build(tmp_path, OURS, model=model)
    runner.test()
    warning, = (line for line in log_of(tmp_path, 'WARNING') if 'ReparamTestHook' in line)
    assert 'has nothing to do' in warning
    assert not [line for line in log_of(tmp_path, 'INFO') if 'agree' in line]
    torch.testing.assert_close(recorded(runner.test_loop.evaluator)[0], predictions(model),
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('value', [-1, 1.5, True, None, '1'])
def test_no_number_of_batches(value):
    with pytest.raises(ValueError, match='verify_batches must be an integer'):
        ReparamTestHook(verify_batches=value)
