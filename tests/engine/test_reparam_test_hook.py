"""Validation with the deployed form: it is the deployed one, and training does not notice."""

import gc

import numpy as np
import pytest
import torch
from helpers import randomize
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel
from small_run import (
    EMA,
    EPOCHS,
    ITERATIONS,
    OURS,
    VAL,
    Net,
    Observer,
    assert_same_tree,
    build,
    described,
    log_of,
    predictions,
    recorded,
)
from torch import nn
from torch.utils.data import default_collate

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.engine import reparam_test_hook
from orepa_mm.engine.reparam_test_hook import ReparamTestHook, without_reparam_test
from orepa_mm.reparam import is_training_form, reparameterize


@pytest.mark.parametrize('train_cfg', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('hooks', [[OURS], [OURS, EMA], [EMA, OURS]],
                         ids=['alone', 'before EMA', 'after EMA'])
def test_training_goes_on_bit_for_bit(tmp_path, hooks, train_cfg):
    """Against a run without the hook; MMEngine's own validation is the oracle of the outputs."""
    runs, states = {}, {}
    for name, used in (('without', [h for h in hooks if h is not OURS]), ('with', hooks)):
        observer = Observer()
        runner = runs[name] = build(
            tmp_path / name, *used, observer, train_cfg=train_cfg,
            checkpoint=dict(save_best='score', rule='greater'))
        runner.train()
        states[name] = (runner.model.state_dict(), runner.optim_wrapper.state_dict(),
                        torch.get_rng_state(), np.random.get_state()[1].tolist())
        assert observer.during == [name == 'without'] * 6
    assert_same_tree(states['with'], states['without'])
    assert not log_of(tmp_path / 'with', 'ERROR')
    assert len([line for line in log_of(tmp_path / 'with', 'INFO')
                if 'training and deployed form agree on batch 0' in line]) == 2

    found, expected = (recorded(runs[name].val_loop.evaluator) for name in ('with', 'without'))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], found[1])

    # the best and the last checkpoint are those of a run without the hook
    files = {name: sorted(path.name for path in (tmp_path / name).glob('*.pth'))
             for name in runs}
    assert files['with'] == files['without']
    assert len([name for name in files['with'] if name.startswith('best_score')]) == 1
    for name in files['with']:
        one, other = (load_checkpoint(tmp_path / run / name) for run in ('with', 'without'))
        for key in ('state_dict', 'ema_state_dict', 'optimizer'):
            assert_same_tree(one.get(key), other.get(key))
        assert 'backbone.0.vector' in one['state_dict']


def test_metrics_are_those_of_the_deployed_form(tmp_path):
    runner = build(tmp_path, OURS)
    runner.train()
    for epoch, found in enumerate(recorded(runner.val_loop.evaluator), 1):
        model = Net()
        model.load_state_dict(load_checkpoint(tmp_path / f'epoch_{epoch}.pth')['state_dict'])
        torch.testing.assert_close(found, predictions(reparameterize(model)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, predictions(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('hooks', [[OURS, EMA], [EMA, OURS]], ids=['before EMA', 'after EMA'])
def test_averaged_weights_are_deployed(tmp_path, hooks):
    runner = build(tmp_path, *hooks)
    runner.train()
    averaged = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    found = recorded(runner.val_loop.evaluator)[-1]
    torch.testing.assert_close(found, predictions(averaged), rtol=1e-5, atol=1e-5)
    assert (found - predictions(runner.model)).abs().max() > 1e-2
    saved = load_checkpoint(tmp_path / 'epoch_2.pth')['state_dict']
    assert torch.equal(saved['backbone.0.vector'], averaged.backbone[0].vector)


@pytest.mark.parametrize('train_cfg', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
def test_the_model_is_back_and_the_copy_gone(tmp_path, train_cfg):
    observer = Observer()
    runner = build(tmp_path, OURS, observer, train_cfg=train_cfg)
    start = runner.model
    assert runner.train() is start
    assert runner.model is start
    assert observer.before == [observer.last] * 2
    # as after a validation without the hook, it is in eval mode
    observer.last = described(runner.model.eval())
    assert observer.after == [observer.last] * 2
    gc.collect()
    assert [copy() for copy in observer.copies] == [None] * 6


def test_test_and_val(tmp_path):
    runner = build(tmp_path, OURS)
    model, before = runner.model, described(runner.model.eval())
    runner.test()
    runner.val()
    assert runner.model is model
    assert described(model) == before
    expected = predictions(reparameterize(model))
    for loop in (runner.test_loop, runner.val_loop):
        found, = recorded(loop.evaluator)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len([line for line in log_of(tmp_path, 'INFO') if 'agree on batch 0' in line]) == 2


def count_calls(monkeypatch, name):
    calls, real = [], getattr(reparam_test_hook, name)
    monkeypatch.setattr(reparam_test_hook, name,
                        lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize(('batches', 'expected'), [(0, 0), (2, 2), (100, 3)])
def test_number_of_compared_batches(tmp_path, monkeypatch, batches, expected):
    calls = count_calls(monkeypatch, 'verify')
    runner = build(tmp_path, dict(OURS, verify_batches=batches))
    runner.test()
    assert len(calls) == expected
    for number, (before, after, (batch,)) in enumerate(calls):
        assert before is runner.model
        assert not is_training_form(after)
        wanted = slice(2 * number, 2 * number + 2)
        assert torch.equal(batch['inputs'], (VAL.inputs[wanted] - 0.5) * 2)
        assert torch.equal(batch['data_samples'], VAL.labels[wanted])


# --- wrapped and special models ---------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/processes',
                                         rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed(tmp_path, process_group):
    from mmengine.model import MMDistributedDataParallel

    states = []
    for name, hooks in (('without', [EMA]), ('with', [OURS, EMA])):
        runner = build(tmp_path / name, *hooks,
                       model=randomize(Net(norm=nn.SyncBatchNorm)))
        runner.model = wrapper = MMDistributedDataParallel(runner.model)
        runner.train()
        assert runner.model is wrapper
        states.append((wrapper.state_dict(), recorded(runner.val_loop.evaluator)))
    assert_same_tree(states[0][0], states[1][0])
    for one, other in zip(states[0][1], states[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not log_of(tmp_path / 'with', 'ERROR')
    assert [line for line in log_of(tmp_path / 'with', 'INFO') if 'agree on batch' in line]


def test_compiled_training_step(tmp_path):
    """MMEngine puts the compiled step on the instance, where copies take it along."""
    states = []
    for name, hooks in (('without', []), ('with', [OURS])):
        runner = build(tmp_path / name, *hooks, cfg=dict(compile=dict(backend='eager')))
        runner.train()
        assert 'train_step' in vars(runner.model)
        states.append(runner.model.state_dict())
    assert_same_tree(*states)


def test_checkpointed_activations(tmp_path):
    """Their closures hold the training model's layers, also in a copy of the model."""
    states, found = [], []
    for name, hooks in (('without', []), ('with', [OURS])):
        runner = build(tmp_path / name, *hooks, cfg=dict(activation_checkpointing=['backbone']))
        runner.train()
        assert 'forward' in vars(runner.model.backbone)
        states.append(runner.model.state_dict())
        found.append(recorded(runner.val_loop.evaluator))
    assert_same_tree(*states)
    assert states[1]['backbone.5.num_batches_tracked'] == 2 * 2  # never in validation
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class MeanTTAModel(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return [torch.stack(samples).mean(0) for samples in data_samples_list]


def test_augmentation_at_test_time_is_kept(tmp_path):
    model = randomize(Net())
    runner = build(tmp_path, OURS, model=MeanTTAModel(module=model))
    runner.test_loop.dataloader.collate_fn = lambda samples: {
        key: [value, value.flip(-1) if key == 'inputs' else value.clone()]
        for key, value in default_collate(samples).items()}
    runner.test()
    with torch.no_grad():
        deployed = reparameterize(model).eval()
        images = (VAL.inputs - 0.5) * 2
        expected = (deployed(images) + deployed(images.flip(-1))) / 2
    torch.testing.assert_close(recorded(runner.test_loop.evaluator)[0], expected,
                               rtol=1e-5, atol=1e-5)
    assert not log_of(tmp_path, 'ERROR')
    assert [line for line in log_of(tmp_path, 'INFO') if 'agree on batch 0' in line]


@pytest.mark.parametrize('kind', [
    ReparamTestHook, 'ReparamTestHook', 'mmengine.ReparamTestHook', 'mmdet.ReparamTestHook',
    'orepa_mm.engine.reparam_test_hook.ReparamTestHook'])
def test_a_config_without_the_hook_however_it_is_named(kind):
    """Else `reparam` would compare the deployed form with itself."""
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook'), dict(type=kind)]))
    assert [hook['type'] for hook in without_reparam_test(cfg).custom_hooks] == ['EMAHook']
    assert len(cfg.custom_hooks) == 2
