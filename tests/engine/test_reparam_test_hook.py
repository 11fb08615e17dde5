"""Validation with the deployed form: it is the deployed one, and training does not notice."""

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from helpers import randomize
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseDataPreprocessor, BaseModel, BaseTTAModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset, default_collate

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.engine import reparam_test_hook
from orepa_mm.engine.reparam_test_hook import ReparamTestHook, without_reparam_test
from orepa_mm.errors import ConfigError, NothingToConvertError, VerificationError
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d
from orepa_mm.reparam import is_training_form, reparameterize

OURS = dict(type='ReparamTestHook')
EMA = dict(type='EMAHook', momentum=0.3)
EPOCHS = dict(by_epoch=True, max_epochs=2)
ITERATIONS = dict(by_epoch=False, max_iters=4, val_interval=2)


class InPlacePreprocessor(BaseDataPreprocessor):
    """Works on the batch that it is given: doing it twice gives something else."""

    def forward(self, data, training=False):
        data['inputs'].sub_(0.5).mul_(2)
        if training:
            data['inputs'] = data['inputs'].flip(-1)
        return super().forward(data, training)


class Net(BaseModel):
    """A classifier with dropout, which draws random numbers in training and, to no use, in eval."""

    def __init__(self, conv=OREPAConv2d, pointwise=OREPAConv1x1, norm=nn.BatchNorm2d):
        super().__init__(InPlacePreprocessor())
        self.backbone = nn.Sequential(
            conv(3, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(), nn.Dropout(0.2),
            pointwise(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.backbone[1].eval()  # as a frozen norm layer
        self.backbone[5].bias.requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def extract_feat(self, inputs):
        return self.backbone(inputs)

    def train(self, mode=True):
        super().train(mode)
        self.backbone[1].eval()
        return self

    def forward(self, inputs, data_samples=None, mode='tensor'):
        logits = self.head(self.extract_feat(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, data_samples))
        if mode == 'predict':
            return list(logits)
        torch.rand(1)
        return logits


class Images(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.rand(count, 3, 8, 8, generator=generator)
        self.labels = torch.arange(count) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return dict(inputs=self.inputs[index], data_samples=self.labels[index])


VAL = Images(6, seed=1)


class Recorder(BaseMetric):
    """What each validation computed."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        self.epochs.append(torch.stack(results))
        return dict(score=float(len(self.epochs)))


class Observer(Hook):
    """What the runner's model is, as the hooks before and after ours see it."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.before, self.during, self.after, self.copies = [], [], [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.last = described(runner.model)

    def before_val(self, runner):
        self.before.append(described(runner.model))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        assert not runner.model.training
        self.during.append(is_training_form(runner.model))
        self.copies.append(weakref.ref(runner.model))

    def after_val_epoch(self, runner, metrics=None):
        self.after.append(described(runner.model))


def described(model):
    """Identity of the model and of its parameters, and all flags."""
    return (id(model), [(name, id(m), m.training) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()])


class QuickRunner(Runner):
    def _log_env(self, env_cfg):
        pass


numbers = itertools.count()


def build(folder, *hooks, model=None, train_cfg=EPOCHS, checkpoint=None, **kwargs):
    torch.manual_seed(0)
    loader = dict(dataset=Images(8, seed=0), batch_size=4, num_workers=0,
                  collate_fn=default_collate)
    val_loader = {**loader, 'dataset': VAL, 'batch_size': 2,
                  'sampler': dict(type='DefaultSampler', shuffle=False)}
    return QuickRunner(
        model or randomize(Net()), str(folder), train_cfg=dict(train_cfg),
        train_dataloader={**loader, 'sampler': dict(
            type='DefaultSampler' if train_cfg['by_epoch'] else 'InfiniteSampler', shuffle=True)},
        val_dataloader=val_loader, val_cfg=dict(), val_evaluator=Evaluator(Recorder()),
        test_dataloader=val_loader, test_cfg=dict(), test_evaluator=Evaluator(Recorder()),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.2, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(
            type='CheckpointHook', interval=1, by_epoch=train_cfg['by_epoch'],
            **(checkpoint or {}))),
        custom_hooks=[dict(hook) if isinstance(hook, dict) else hook for hook in hooks],
        randomness=dict(seed=0), experiment_name=f'{folder.name}-{next(numbers)}', **kwargs)


def recorded(evaluator):
    return evaluator.metrics[0].epochs


def predictions(model):
    """From scratch: all images in one batch, preprocessed by hand."""
    model = copy.deepcopy(model)
    model.eval()
    with torch.no_grad():
        return model((VAL.inputs - 0.5) * 2)


def log_of(folder, level):
    lines = '\n'.join(path.read_text() for path in folder.rglob('*.log')).split('\n20')
    return [line for line in lines if f' - {level} - ' in line]


def assert_same_tree(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same_tree(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


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
    assert observer.before == observer.after == [observer.last] * 2
    gc.collect()
    assert [copy() for copy in observer.copies] == [None] * 6


def test_test_and_val(tmp_path):
    runner = build(tmp_path, OURS)
    model, before = runner.model, described(runner.model)
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


# --- what must be loud ------------------------------------------------------------


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
    assert 'features in float32: ' in errors[0]
    assert 'starts in the layer backbone.4' in errors[0]


def test_a_difference_stops(tmp_path, wrong_conversion):
    runner = build(tmp_path, dict(OURS, stop_on_difference=True))
    model = runner.model
    with pytest.raises(VerificationError, match='features in float32'):
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
