"""Validation with the deployed form: whatever is wrong is said loudly, and costs nothing."""

import pytest
import torch
from helpers import randomize
from mmengine.hooks import EMAHook, Hook
from small_run import EMA, OURS, Net, build, log_of, predictions, recorded
from torch import nn

from orepa_mm.checkpoints import load_checkpoint
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
    assert ' in float32: ' in errors[0]
    assert 'starts in the layer backbone.4' in errors[0]


def test_a_difference_stops(tmp_path, wrong_conversion):
    runner = build(tmp_path, dict(OURS, stop_on_difference=True))
    model = runner.model
    with pytest.raises(VerificationError, match='in float32'):
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


@pytest.mark.parametrize('run', ['train', 'val', 'test'])
def test_two_of_them_are_refused(tmp_path, run):
    with pytest.raises(ConfigError, match='two ReparamTestHooks'):
        getattr(build(tmp_path, OURS, OURS), run)()
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize(('ema', 'ours'), [('LOWEST', 'LOW'), ('NORMAL', 'VERY_HIGH'),
                                           ('LOW', 'LOW'), ('NORMAL', 'LOWEST')])
def test_in_whatever_order_the_hooks_run(tmp_path, ema, ours):
    """The averages are deployed, and `save_best` saves the training form."""
    runner = build(tmp_path, dict(OURS, priority=ours), dict(EMA, priority=ema),
                   checkpoint=dict(save_best='score', rule='greater'))
    runner.train()
    averaged = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    found = recorded(runner.val_loop.evaluator)[-1]
    torch.testing.assert_close(found, predictions(averaged), rtol=1e-5, atol=1e-5)
    best, = tmp_path.glob('best_*.pth')
    assert 'backbone.0.vector' in load_checkpoint(best)['state_dict']


def test_a_second_validation_inside_deploys_the_weights_of_its_own(tmp_path):
    """MMPretrain's hook validates with both kinds of weights."""
    pytest.importorskip('mmpretrain.engine')
    runner = build(tmp_path, OURS, dict(EMA, type='mmpretrain.EMAHook', evaluate_on_origin=True))
    runner.train()
    averaged = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    for found, model in zip(recorded(runner.val_loop.evaluator)[-2:], (averaged, runner.model)):
        torch.testing.assert_close(found, predictions(model), rtol=1e-5, atol=1e-5)
    assert (found - predictions(averaged)).abs().max() > 1e-2
    assert not log_of(tmp_path, 'ERROR')


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
