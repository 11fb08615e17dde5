"""Checkpoints that survive a kill, against the stock hook, and against real kills."""

import itertools
import multiprocessing
import random
import re
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import init_default_scope
from torch.utils._python_dispatch import TorchDispatchMode
from toy_run import toy_config, train

from orepa_mm import files
from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.engine import build_runner
from orepa_mm.engine.checkpoint_hook import (
    WholeCheckpointHook,
    non_finite_weights,
    use_whole_checkpoints,
)
from orepa_mm.engine.resume import newest_checkpoint
from orepa_mm.errors import ConfigError, DivergedError
from orepa_mm.export import deploy_config

numbers = itertools.count()
WIDE = 500  # 2 MB a checkpoint: most of the time goes into writing


def run(folder, *args, **kwargs):
    return train(folder, *args, experiment_name=f'{folder.name}-{next(numbers)}', **kwargs)


def written(folder):
    """Names of all files but logs, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()
                  and not path.parent.name.startswith(('20', 'vis_data'))
                  and path.name != 'progress' and path.suffix != '.py')


def iteration(path):
    return load_checkpoint(path)['meta']['iter']


# --- as the stock hook ------------------------------------------------------------


@pytest.mark.parametrize(('checkpoint', 'kwargs'), [
    (dict(), {}),
    (dict(max_keep_ckpts=1), {}),
    (dict(max_keep_ckpts=2, save_optimizer=False), dict(by_epoch=True)),
    (dict(max_keep_ckpts=1, save_last=False), dict(max_iters=5)),
    (dict(max_keep_ckpts=1), dict(max_iters=5)),
    (dict(max_keep_ckpts=1, save_best='acc'), dict(scores=[1, 3, 2, 2, 5, 4])),
    (dict(max_keep_ckpts=1, save_best='acc'), dict(scores=[1, 3, 2, 2, 5, 4], by_epoch=True)),
    (dict(max_keep_ckpts=2, save_best=['acc', 'loss']), dict(scores=[4, 3, 2, 2, 5, 1])),
    (dict(max_keep_ckpts=1, save_best='auto', published_keys=['meta', 'state_dict']),
     dict(scores=[4, 3, 2, 2, 5, 1])),
    (dict(max_keep_ckpts=1, out_dir='elsewhere'), {}),
    (dict(max_keep_ckpts=1, filename_tmpl='step-{}.pth', save_begin=3), {}),
])
def test_writes_and_keeps_what_the_stock_hook_does(tmp_path, monkeypatch, checkpoint, kwargs):
    monkeypatch.chdir(tmp_path)
    for name, hook in (('stock', 'CheckpointHook'), ('ours', 'WholeCheckpointHook')):
        (tmp_path / name).mkdir()
        options = dict(checkpoint)
        if 'out_dir' in options:
            options['out_dir'] = str(tmp_path / name / 'elsewhere')
        run(tmp_path / name / 'run', hook, checkpoint=options, **kwargs)
    stock, ours = written(tmp_path / 'stock'), written(tmp_path / 'ours')
    if 'published_keys' in checkpoint:  # their names hold a hash of everything, the time too
        assert len(stock) == len(ours)
        stock, ours = ([name for name in names if '-' not in name] for names in (stock, ours))
    assert ours == stock
    assert any(name.endswith('.pth') for name in ours)
    for name in ours:
        one, other = tmp_path / 'stock' / name, tmp_path / 'ours' / name
        if name.endswith('.pth'):
            one, other = load_checkpoint(one), load_checkpoint(other)
            assert one.keys() == other.keys()
            assert one['meta']['iter'] == other['meta']['iter']
            for key, value in one['state_dict'].items():
                assert torch.equal(value, other['state_dict'][key])
            infos = [dict(c['message_hub']['runtime_info']) for c in (one, other)]
            # one more is there while a new one is written
            kept = infos[0].get('keep_ckpt_ids', [])
            assert infos[1].get('keep_ckpt_ids', [])[-len(kept) or None:] == kept
            assert infos[0].keys() == infos[1].keys()
        else:
            assert other.read_text() == one.read_text().replace('/stock/', '/ours/')


def test_a_best_checkpoint_that_replaces_one_of_its_own_name_stays(tmp_path):
    runner = run(tmp_path, checkpoint=dict(save_best='acc'), scores=[1], max_iters=1)
    hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    hook.after_val_epoch(runner, dict(acc=2))
    assert written(tmp_path) == ['best_acc_iter_1.pth', 'iter_1.pth', 'last_checkpoint']


# --- stopped in the middle --------------------------------------------------------


class Kill(BaseException):
    """Nothing catches it: what follows is what a killed process leaves, less its locks."""


def stop_at(monkeypatch, name):
    """Stop as soon as a file whose name starts so would get it."""
    real = files.os.replace

    def replace(source, target):
        if Path(target).name.startswith(name):
            raise Kill
        real(source, target)

    monkeypatch.setattr(files.os, 'replace', replace)


@pytest.mark.parametrize(('where', 'left', 'pointer'), [
    # a new best one lets the stock hook write the last one as well
    ('iter_4', ['best_acc_iter_3.pth', 'iter_3.pth'], 'iter_3.pth'),
    ('best_acc_iter_4', ['best_acc_iter_3.pth', 'iter_4.pth'], 'iter_4.pth'),
])
def test_the_old_one_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch, where, left,
                                                         pointer):
    stop_at(monkeypatch, where)
    options = dict(checkpoint=dict(max_keep_ckpts=1, save_best='acc'))
    with pytest.raises(Kill):
        run(tmp_path, scores=range(9), **options)
    assert written(tmp_path) == [*left, 'last_checkpoint']
    assert Path((tmp_path / 'last_checkpoint').read_text()) == tmp_path / pointer
    for name in left:
        load_checkpoint(tmp_path / name)
    monkeypatch.undo()
    run(tmp_path, resume=True, scores=range(9, 12), **options)
    assert written(tmp_path) == ['best_acc_iter_6.pth', 'iter_6.pth', 'last_checkpoint']


def test_the_pointer_is_moved_before_the_old_one_is_removed(tmp_path, monkeypatch):
    options = dict(checkpoint=dict(max_keep_ckpts=1))
    run(tmp_path, max_iters=2, **options)
    stop_at(monkeypatch, 'last_checkpoint')
    with pytest.raises(Kill):
        run(tmp_path, resume=True, **options)
    assert written(tmp_path) == ['iter_2.pth', 'iter_4.pth', 'last_checkpoint']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_2.pth')


def test_what_a_killed_run_left_is_removed(tmp_path, monkeypatch):
    """Unfinished files, and the checkpoint that it had no time to remove; nothing else."""
    options = dict(checkpoint=dict(max_keep_ckpts=1))
    run(tmp_path, max_iters=2, **options)
    monkeypatch.setattr(WholeCheckpointHook, '_remove', lambda self, path: None)
    run(tmp_path, max_iters=4, resume=True, **options)
    monkeypatch.undo()
    for name in ('.iter_6.new-0123abcd.pth', '.best_acc_iter_6.new-0123abcd.pth',
                 '.last_checkpoint.new-0123abcd', '.mine.pth', 'iter_1.pth'):
        (tmp_path / name).write_text('')
    assert 'iter_2.pth' in written(tmp_path)
    with files.written_whole(tmp_path / 'iter_6.pth') as alive:  # of a run beside this one
        run(tmp_path, max_iters=4, resume=True, **options)
        assert written(tmp_path) == sorted([alive.name, '.mine.pth', 'iter_1.pth', 'iter_4.pth',
                                            'last_checkpoint'])


def test_six_kills_lose_at_most_the_last_interval(tmp_path):
    """Real ones, at random moments of real processes."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['orepa_mm.engine', 'mmengine.runner'])
    moments, done = random.Random(0), 0
    options = dict(width=WIDE, max_iters=10**6, checkpoint=dict(max_keep_ckpts=1), resume=True)
    for _ in range(6):
        process = context.Process(target=train, args=(tmp_path,), kwargs=options)
        process.start()
        lines = progress_of(tmp_path, process, until=done + 3)
        assert int(lines[0]) == done  # where it went on
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        reached = int(progress_of(tmp_path, process)[-1])
        path, problem = newest_checkpoint(tmp_path)
        assert not problem
        assert (load_checkpoint(path)['state_dict']['layer.weight']).isfinite().all()
        done = iteration(path)
        assert done >= reached // 2 * 2
        assert len(list(tmp_path.glob('iter_*.pth'))) <= 2
    options['max_iters'] = done + 4
    process = context.Process(target=train, args=(tmp_path,), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert written(tmp_path) == [f'iter_{done + 4}.pth', 'last_checkpoint']


def progress_of(folder, process, until=0):
    """Numbers of the iterations that a process began; waits for the given one."""
    deadline, file = time.monotonic() + 60, folder / 'progress'
    while True:
        lines = file.read_text().splitlines() if file.exists() else []
        own = [line.split()[1] for line in lines if line.split()[0] == str(process.pid)]
        if own and int(own[-1]) >= until:
            return own
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- diverged ---------------------------------------------------------------------


def diverging(folder, lr=1e6, **checkpoint):
    options = dict(max_iters=20, experiment_name=f'{folder.name}-{next(numbers)}')
    cfg = toy_config(folder, checkpoint=checkpoint, **options)
    cfg.optim_wrapper.optimizer.lr = lr
    return build_runner(cfg)


def finite(path):
    return all(value.isfinite().all() for value in load_checkpoint(path)['state_dict'].values())


def test_a_run_that_diverges_is_stopped(tmp_path):
    """And only the check does it: without it the run ends well, with weights that are lost."""
    folder = tmp_path / 'a run'
    with pytest.raises(DivergedError) as error:
        diverging(folder).train()
    files = [name for name in written(folder) if name.endswith('.pth')]
    assert files
    assert all(finite(folder / name) for name in files)
    last = (folder / 'last_checkpoint').read_text()
    assert Path(last).name == max(files, key=lambda name: int(name[5:-4]))
    said = str(error.value)
    assert re.match(r'the training has diverged: the loss is (inf|nan) in iteration \d+; '
                    r'NaN or Inf is in layer\.weight, layer\.bias\. Nothing was saved', said)
    assert f"The last good checkpoint is {last}: start from it" in said
    assert f"(--cfg-options load_from='{last}')" in said
    diverging(tmp_path / 'on', check_finite=False).train()
    assert not finite(tmp_path / 'on' / 'iter_20.pth')


def test_a_run_that_diverges_before_its_first_checkpoint(tmp_path):
    for options in (dict(interval=100), dict(by_epoch=True)):
        folder = tmp_path / str(len(options)) / next(iter(options))
        cfg = toy_config(folder, max_iters=20, experiment_name=f'first-{next(numbers)}')
        cfg.default_hooks.checkpoint.update(options)
        cfg.optim_wrapper.optimizer.lr = 1e30
        with pytest.raises(DivergedError, match=r'no good checkpoint in .*: start anew'):
            build_runner(cfg).train()
        assert [name for name in written(folder) if 'checkpoint' in name or '.pth' in name] == []


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_are_looked_at_before_they_are_saved(tmp_path, value):
    """However they were lost: the loss says nothing of it."""
    class Spoils(Hook):
        def after_train_iter(self, runner, **_):
            if runner.iter == 3:
                runner.model.layer.bias.data[0] = value

    runner = diverging(tmp_path, lr=0.01)
    runner.register_hook(Spoils(), 'HIGH')
    with pytest.raises(DivergedError, match=r'NaN or Inf is in layer\.bias\. .*iter_2\.pth'):
        runner.train()
    assert written(tmp_path) == ['iter_2.pth', 'last_checkpoint']


def test_a_loss_that_alone_is_lost_stops_nothing(tmp_path):
    """In mixed precision such a step is skipped."""
    class Scales(Hook):
        def before_train(self, runner):
            update, forward = runner.optim_wrapper.update_params, runner.model._run_forward
            runner.optim_wrapper.update_params = lambda loss: runner.iter == 3 or update(loss)
            runner.model._run_forward = lambda *args, **kwargs: {
                key: value * (float('inf') if runner.iter == 3 else 1)
                for key, value in forward(*args, **kwargs).items()}

    runner = diverging(tmp_path, lr=0.01)
    runner.register_hook(Scales())
    runner.train()
    assert runner.message_hub.get_scalar('train/loss').data[0][3] == float('inf')
    assert finite(tmp_path / 'iter_20.pth')


def test_weights_that_a_run_cannot_start_from(tmp_path):
    runner = diverging(tmp_path)
    torch.nn.init.constant_(runner.model.layer.weight, float('nan'))
    with pytest.raises(DivergedError, match='that the training starts from are not finite'):
        runner.train()


def test_what_counts_as_lost():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    model.register_buffer('mask', torch.full((2, 2), -torch.inf))
    model.register_parameter('none', torch.nn.Parameter(torch.empty(0)))
    assert non_finite_weights(model) == []
    model[1].running_var[0] = torch.inf
    model[0].weight.data[0] = torch.nan
    assert non_finite_weights(model) == ['0.weight', '1.running_var']
    assert non_finite_weights(torch.nn.ReLU()) == []


def test_the_device_is_waited_for_once(tmp_path):
    """Whatever the size of the model: what reads from a device goes through one operation."""
    class Counts(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.reads += function in (torch.ops.aten._local_scalar_dense.default,
                                       torch.ops.aten._to_copy.default)
            return function(*args, **(kwargs or {}))

    with Counts() as counts:
        non_finite_weights(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(9)]))
    assert counts.reads == 0  # but for `tolist`, which copies what one tensor holds


def test_an_option_that_is_none_is_said_at_once():
    """The stock hook takes it, and fails when the first checkpoint is written."""
    assert CheckpointHook(max_keep_ckpt=1).args == dict(max_keep_ckpt=1)
    with pytest.raises(ConfigError, match='no option max_keep_ckpt'):
        WholeCheckpointHook(max_keep_ckpt=1)


# --- who uses it ------------------------------------------------------------------


def test_configs_that_import_us_use_it():
    light = Config.fromfile(
        ROOT / 'configs' / 'upernet' / 'upernet_orepa-r18-light_400i_cityscapes-192x192.py')
    assert light.default_hooks.checkpoint.type == 'WholeCheckpointHook'  # with anybody's tools
    assert light.default_hooks.checkpoint.max_keep_ckpts == 1
    init_default_scope(light.default_scope)
    deployed = deploy_config(light).default_hooks.checkpoint
    assert deployed.type == 'CheckpointHook'
    assert deployed.max_keep_ckpts == 1


@pytest.mark.parametrize(('imports', 'found', 'expected'), [
    (['orepa_mm'], 'CheckpointHook', 'WholeCheckpointHook'),
    ('orepa_mm.engine', CheckpointHook, 'WholeCheckpointHook'),
    (['other', 'orepa_mm'], 'mmengine.CheckpointHook', 'WholeCheckpointHook'),
    (['orepa_mm'], 'OtherHook', 'OtherHook'),
    (['other'], 'CheckpointHook', 'CheckpointHook'),
])
def test_the_stock_hook_is_exchanged(imports, found, expected):
    cfg = Config(dict(custom_imports=dict(imports=imports), default_hooks=dict(
        checkpoint=dict(type=found, interval=3))))
    use_whole_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint == dict(type=expected, interval=3)


def test_configs_without_hooks_are_left_alone():
    for content in ({}, dict(default_hooks=dict()), dict(default_hooks=dict(checkpoint=None))):
        cfg = Config(dict(content, custom_imports=dict(imports=['orepa_mm'])))
        use_whole_checkpoints(cfg)
        assert cfg.get('default_hooks') == content.get('default_hooks')
    assert WholeCheckpointHook().priority == CheckpointHook.priority


def test_the_stock_hook_gets_no_option_of_ours():
    light = Config.fromfile(
        ROOT / 'configs' / 'upernet' / 'upernet_orepa-r18-light_400i_cityscapes-192x192.py')
    light.default_hooks.checkpoint.check_finite = False
    init_default_scope(light.default_scope)
    assert 'check_finite' not in deploy_config(light).default_hooks.checkpoint
