"""Runs of a comparison: planned, run, interrupted, resumed, failed."""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from mmengine.config import Config

from orepa_mm.analysis.variants import Variant
from orepa_mm.datasets import make_shapes_coco
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.errors import ConfigError
from orepa_mm.workflow import comparison
from orepa_mm.workflow.comparison import execute, plan_runs

CONFIG = f'''
_base_ = '{ROOT}/configs/retinanet/retinanet_orepa-r18-light_fpn_400i_coco.py'
model = dict(
    backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('comparison')
    make_shapes_coco(folder / 'data', 4, 2, 64)
    (folder / 'config.py').write_text(CONFIG)
    return folder


def config(folder):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args([str(folder / 'config.py'), '--data-root',
                                          str(folder / 'data')]))


def plan(folder, out, *texts, seeds=(0,), **options):
    return plan_runs(config(folder), [Variant.parse(text) for text in texts], seeds, out,
                     **options)


def test_a_plan(folder, tmp_path):
    runs = plan(folder, tmp_path, 'plain', 'orepa', 'plain', seeds=(3, 1))
    assert [run.name for run in runs] == ['plain, seed 3', 'orepa, seed 3', 'plain, seed 1',
                                          'orepa, seed 1']
    configs = [Config.fromfile(run.folder / 'config.py') for run in runs]
    assert [cfg.randomness.seed for cfg in configs] == [3, 3, 1, 1]
    assert configs[0].model.backbone.type == 'ResNet'
    assert configs[0].optim_wrapper == configs[1].optim_wrapper
    assert configs[1].custom_hooks[-1] == dict(type='KernelStepHook', interval=50)
    written = {run.folder: (run.folder / 'config.py').stat().st_mtime_ns for run in runs}
    plan(folder, tmp_path, 'plain', 'orepa', seeds=(3, 1, 4))  # more of the same
    assert written == {run.folder: (run.folder / 'config.py').stat().st_mtime_ns for run in runs}


def test_another_config_in_the_same_folder(folder, tmp_path):
    plan(folder, tmp_path, 'plain')
    with pytest.raises(ConfigError, match='of another config or of other options'):
        plan(folder, tmp_path, 'orepa', 'plain', step_interval=7)
    assert not (tmp_path / 'runs' / 'orepa').exists()


def test_missing_weights_before_anything_is_written(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        plan(folder, tmp_path, 'plain', 'expand', plain_checkpoint=tmp_path / 'none.pth')
    assert not (tmp_path / 'runs').exists()


def test_what_no_run_could_do_before_anything_is_written(folder, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='file is no folder'):
        plan(folder, tmp_path / 'file', 'plain')
    out = tmp_path / 'out'
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match='seeds lie between'):
            plan(folder, out, 'plain', seeds=(0, seed))
    untested = config(folder)
    untested.merge_from_dict(dict(test_cfg=None, test_dataloader=None, test_evaluator=None))
    with pytest.raises(ConfigError, match='tests nothing'):
        plan_runs(untested, [Variant.parse('plain')], [0], out)
    same = ['plain:train_cfg.x=[1,2]', 'plain:train_cfg.x=(1,2)']
    with pytest.raises(ConfigError, match='would share the folder'):
        plan(folder, out, *same)
    assert not out.exists()
    plan(folder, out, same[0])
    with pytest.raises(ConfigError, match='of another config'):
        plan(folder, out, same[1])


def test_the_kernel_is_measured_where_it_takes_a_step(folder, tmp_path):
    run, = plan(folder, tmp_path, 'plain:optim_wrapper.accumulative_counts=4')
    assert Config.fromfile(run.folder / 'config.py').custom_hooks[-1].interval == 100


def test_the_gpus_that_a_user_may_have(monkeypatch):
    monkeypatch.setattr(comparison.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    names = [comparison._environment(slot, 3)['CUDA_VISIBLE_DEVICES'] for slot in range(3)]
    assert names == ['0', '1', '0']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,GPU-abc')
    names = [comparison._environment(slot, 3)['CUDA_VISIBLE_DEVICES'] for slot in range(3)]
    assert names == ['2', 'GPU-abc', '2']
    assert comparison._environment(0, 1)['CUDA_VISIBLE_DEVICES'] == '2,GPU-abc'


def test_a_run_takes_the_place_of_one_that_has_ended(folder, tmp_path, monkeypatch):
    runs, at_work, met = plan(folder, tmp_path, 'plain', seeds=range(6)), [], []

    def train(run, slot, parallel, stopped):
        at_work.append(slot)
        time.sleep(0.5 if run.seed == 0 else 0.05)  # the first is slow
        met.append(sorted(at_work) in ([0], [1], [0, 1]))
        at_work.remove(slot)
        return 1

    monkeypatch.setattr(comparison, '_train', train)
    for run in runs:
        (run.folder / 'log.txt').write_text('line')
    assert execute(runs, parallel=2, say=lambda line: None) == runs
    assert met == [True] * 6


@pytest.fixture(scope='module')
def executed(folder, tmp_path_factory):
    """Both forms of a small detector, and a variant that fails."""
    out, lines = os.path.relpath(tmp_path_factory.mktemp('out')), []
    runs = plan(folder, out, 'plain', 'orepa', 'orepa:train_dataloader.batch_size=-1',
                step_interval=1)
    return runs, execute(runs, parallel=2, say=lines.append), lines


def test_the_results(executed):
    (plain, orepa, wrong), failed, _ = executed
    assert failed == [wrong]
    assert wrong.result is None
    assert set(plain.result['metrics']) == {'deployed'}
    assert plain.result['largest_difference'] == {}
    metrics = orepa.result['metrics']
    assert metrics['training'] == pytest.approx(metrics['deployed'], abs=1e-4)
    assert 0 < orepa.result['largest_difference']['float32'] < 1e-4
    assert orepa.result['parameters'] > plain.result['parameters']
    for run in (plain, orepa):
        assert run.result['iterations'] == 2
        assert run.result['kernel_step'] > 0
        assert run.result['seconds_per_iteration'] > 0
        assert run.result['peak_bytes'] > 1e8
        assert run.fraction == 1
        assert (run.folder / run.result['checkpoint']).is_file()
    assert (orepa.folder / 'deployed' / 'model.pth').is_file()


def test_the_lines(executed):
    _, _, lines = executed
    assert any('plain, seed 0: starts' in line for line in lines)
    assert any('orepa, seed 0: finished in' in line for line in lines)
    line, = (line for line in lines if 'FAILED' in line)
    assert 'batch_size' in line
    assert 'log.txt' in line


def test_what_has_finished_is_not_run_again(executed):
    (plain, orepa, _), _, _ = executed
    before = (orepa.folder / 'result.json').stat().st_mtime_ns
    lines = []
    assert execute([plain, orepa], say=lines.append) == []
    assert lines == ['2 of 2 runs have finished before']
    assert (orepa.folder / 'result.json').stat().st_mtime_ns == before


@pytest.mark.long
def test_a_killed_run_goes_on(folder, tmp_path):
    runs = plan(folder, tmp_path, 'orepa:train_cfg.max_iters=4000')
    command = [sys.executable, '-m', 'orepa_mm.workflow.comparison_run', str(runs[0].folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list((runs[0].folder / 'train').glob('iter_*.pth')) and time.time() < deadline:
        time.sleep(0.1)
    second = subprocess.run(command, capture_output=True, text=True)  # beside the first
    assert second.returncode == 1
    assert 'another process works in' in second.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert runs[0].result is None
    done = max(int(path.stem.partition('_')[2])
               for path in (runs[0].folder / 'train').glob('iter_*.pth'))
    path = runs[0].folder / 'config.py'
    path.write_text(path.read_text().replace('max_iters=4000', f'max_iters={done + 2}'))
    lines = []
    assert execute(runs, say=lines.append) == []
    assert 'goes on' in lines[0]
    assert runs[0].result['iterations'] == done + 2
    assert runs[0].result['peak_bytes'] is None
    assert f'resumed epoch: 0, iter: {done}' in (runs[0].folder / 'log.txt').read_text()


def test_a_stopped_comparison_stops_its_processes(folder, tmp_path, monkeypatch):
    runs = plan(folder, tmp_path, 'orepa:train_cfg.max_iters=4000')

    def interrupt(self):  # as Ctrl-C does to the main thread, while a run is at work
        if (runs[0].folder / 'lock').exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(comparison._Progress, 'report', interrupt)
    monkeypatch.setattr(comparison, '_SAY', 0.5)
    with pytest.raises(KeyboardInterrupt):
        execute(runs, say=lambda line: None)
    assert runs[0].result is None
    with (runs[0].folder / 'lock').open('w') as lock:  # nobody holds it any more
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

