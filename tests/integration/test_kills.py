"""Tools killed between any two of their file operations: the whole output, or none.

A child counts what it does to files in the folder of the output, and kills itself (SIGKILL)
before one of these operations. It is forked, which saves the imports.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from helpers import ROOT, vary_scales
from mmengine.config import Config
from mmengine.registry import MODELS
from two_processes import forked

from orepa_mm.analysis.variants import Variant
from orepa_mm.checkpoints import load_checkpoint, load_weights
from orepa_mm.datasets import make_shapes_imagenet
from orepa_mm.engine import add_config_arguments, load_config
from orepa_mm.export import convert_checkpoint_file, deploy_config
from orepa_mm.reparam import reparameterize
from orepa_mm.workflow import expand_checkpoint, reparameterize_checkpoint
from orepa_mm.workflow.comparison import execute, plan_runs
from orepa_mm.workflow.comparison_run import LOCK, TRAINED

CONFIG = f'''
_base_ = '{ROOT}/configs/imagenet/orepa-resnet18-light_300i_in1k.py'
model = dict(backbone=dict(base_channels=8, stem_channels=32), head=dict(in_channels=64))
test_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
'''
#: Every file operation that Python reports before it happens.
OPERATIONS = {'open', 'os.chmod', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir'}
#: The moment when PyTorch, whose operations nobody reports, has written half of a file.
HALF = 'half of torch.save'
RESULT = ['config.py', 'model.pth', 'report.json']


def config(folder):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args([str(folder / 'config.py'), '--data-root',
                                          str(folder / 'data'), '--work-dir',
                                          str(folder / f'work{os.getpid()}')]))


def convert(folder, out):
    convert_checkpoint_file(folder / 'trained.pth', out / 'result.pth', form='deploy')


def expand(folder, out):
    expand_checkpoint(config(folder), folder / 'plain.pth', out / 'result.pth', num_images=1)


def reparam(folder, out, checkpoint='trained.pth'):
    reparameterize_checkpoint(config(folder), folder / checkpoint, out / 'result', test=False,
                              num_images=1, latency_rounds=1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Data, a config, and tiny checkpoints: two in training form, and one plain."""
    folder = tmp_path_factory.mktemp('kills')
    make_shapes_imagenet(folder / 'data', 12, 12, 32)
    (folder / 'config.py').write_text(CONFIG)
    cfg = config(folder)
    for seed, name in enumerate(['trained', 'other']):
        torch.manual_seed(seed)
        model = MODELS.build(cfg.model)
        vary_scales(model)
        torch.save({'meta': {}, 'state_dict': model.state_dict()}, folder / f'{name}.pth')
    plain = MODELS.build(deploy_config(cfg).model)
    torch.save({'meta': {}, 'state_dict': plain.state_dict()}, folder / 'plain.pth')
    return folder


# --- processes ----------------------------------------------------------------------


def started(job, *args, kill_at=None, meet=None):
    """Begin a job in a process that was forked when everything was imported."""
    return forked(_run, job, args, kill_at, meet)


def _run(job, args, kill_at, meet):
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    out, seen, save = str(args[1]), [], torch.save

    def before(event, words):
        if event not in OPERATIONS | {HALF} or not any(str(word).startswith(out) for word in words):
            return
        if len(seen) == kill_at:
            if event == HALF:
                os.truncate(words[0], os.path.getsize(words[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)
        if meet is not None and event == 'os.rename' and str(words[1]) == f'{out}/result':
            meet.wait(60)

    def save_in_halves(content, path, *more, **options):
        save(content, path, *more, **options)
        before(HALF, [path])

    torch.save = save_in_halves
    sys.addaudithook(before)
    try:
        job(*args)
    except OSError as error:
        (args[1].parent / f'error{os.getpid()}').write_text(str(error))
        sys.exit(1)
    (args[1].parent / 'operations').write_text(json.dumps(seen))


def finished(job, *args):
    """Do a job to its end; the file operations that it took."""
    process = started(job, *args)
    process.join()
    assert process.exitcode == 0
    return json.loads((args[1].parent / 'operations').read_text())


def killed(job, *args, at):
    process = started(job, *args, kill_at=at)
    process.join()
    assert process.exitcode == -signal.SIGKILL


# --- what may be there --------------------------------------------------------------


def visible(out):
    return sorted(path.name for path in out.iterdir() if not path.name.startswith('.'))


def content(out):
    """The weights of a result, which is whole; None where there is none."""
    path = out / 'result'
    if path.is_dir():
        assert sorted(found.name for found in path.iterdir()) == RESULT
        model = MODELS.build(Config.fromfile(path / 'config.py').model)
        load_weights(model, path / 'model.pth')
        return model.state_dict()
    assert visible(out) in ([], ['result.pth'])
    return load_checkpoint(out / 'result.pth')['state_dict'] if visible(out) else None


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(('job', 'kills'), [(convert, 3), (expand, 1), (reparam, 1)])
def test_the_whole_output_or_none(folder, tmp_path, job, kills):
    out = tmp_path / 'whole' / 'out'
    out.mkdir(parents=True)
    operations, expected = finished(job, folder, out), content(out)
    moments = [operations.index(HALF), *random.Random(0).sample(range(len(operations)), kills)]
    for number, at in enumerate(sorted(moments)):
        out = tmp_path / str(number) / 'out'
        out.mkdir(parents=True)
        killed(job, folder, out, at=at)
        found = content(out)
        assert found is None or equal(found, expected), at
    if found is None:  # the next run works
        finished(job, folder, out)
    assert equal(content(out), expected)


def everything(folder, out):
    """As `reparam`, with all that it can write."""
    reparameterize_checkpoint(config(folder), folder / 'trained.pth', out / 'result',
                              form='folded', onnx=True, end2end=True, num_images=1,
                              int8=dict(calibration_images=2), latency_rounds=1)


@pytest.mark.long
@pytest.mark.parametrize(('job', 'kills'), [(convert, 60), (expand, 30), (reparam, 30),
                                            (everything, 10)])
def test_kills_at_any_moment(folder, tmp_path, job, kills):
    """All into one place: what a killed run left may not stand in the way of the next."""
    out, chance = tmp_path / 'run' / 'out', random.Random(0)
    for _ in range(2):  # the first one waits for the server that forks
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        start = time.monotonic()
        finished(job, folder, out)
        seconds, names = time.monotonic() - start, entries(out)
    shutil.rmtree(out)
    out.mkdir()
    cut = 0
    for _ in range(kills):
        process = started(job, folder, out)
        time.sleep(chance.random() * seconds)
        process.kill()
        process.join()
        cut += process.exitcode == -signal.SIGKILL
        assert entries(out) in ([], names)
    assert cut > kills // 5  # else they came too late
    finished(job, folder, out)
    assert entries(out) == names
    assert not list(out.rglob('.*'))


def entries(out):
    """All visible files below."""
    return sorted(str(path.relative_to(out)) for path in out.rglob('*')
                  if not any(part.startswith('.') for part in path.relative_to(out).parts))


def test_two_into_one_folder(folder, tmp_path):
    """Both are done before either puts its files in place: one wins whole, the other says so."""
    out, checkpoints = tmp_path / 'out', ('trained.pth', 'other.pth')
    out.mkdir()
    meet = multiprocessing.get_context('forkserver').Barrier(2)
    both = [started(reparam, folder, out, name, meet=meet) for name in checkpoints]
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [0, 1]
    winner = checkpoints[both[1].exitcode == 0]
    assert json.loads((out / 'result' / 'report.json').read_text())['checkpoint'] == str(
        folder / winner)
    model = MODELS.build(config(folder).model)
    load_weights(model, folder / winner)
    assert equal(content(out), reparameterize(model).state_dict())
    assert visible(out) == os.listdir(out) == ['result']
    error, = tmp_path.glob('error*')
    assert str(out / 'result') in error.read_text()


def test_a_killed_comparison_leaves_no_training(folder, tmp_path):
    """Which would keep the same command from going on."""
    run, = plan_runs(config(folder), [Variant.parse('plain:train_cfg.max_iters=10000')], [0],
                     tmp_path)
    process = forked(execute, [run])
    deadline = time.monotonic() + 300
    while not (run.folder / TRAINED).exists():  # looking at the lock would hold it
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.join()
    while is_locked(run.folder / LOCK):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.result is None


def is_locked(path):
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
