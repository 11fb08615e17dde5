"""Two processes average their gradients: they learn what one learns from both their batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, exit_code, metrics_of_test
from two_processes import exit_codes, together

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.datasets import make_shapes_imagenet

#: In order and without a flip, so that two batches of 2 hold the images of one of 4. A classifier,
#: whose loss is a mean over images; BN in eval mode, whose statistics are not those of a batch.
CONFIG = f'''
_base_ = '{ROOT}/configs/imagenet/orepa-resnet18-light_300i_in1k.py'
model = dict(backbone=dict(base_channels=8, stem_channels=8, norm_eval=True),
             head=dict(in_channels=64))
train_dataloader = dict(
    num_workers=0, persistent_workers=False, sampler=dict(shuffle=False),
    dataset=dict(pipeline={{{{_base_.test_pipeline}}}}))
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=3, val_interval=3)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9,
                                    weight_decay=1e-4))
param_scheduler = None
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=-1),
                     logger=dict(interval=1))
'''
TOOLS = ROOT / 'tools'
ON_CPU = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1',
          'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two processes')
    make_shapes_imagenet(folder / 'data', 12, 12, 64)
    (folder / 'config.py').write_text(CONFIG)
    return folder


def options(folder, name, batch_size=4, *more):
    return [folder / 'config.py', '--work-dir', folder / name, '--data-root', folder / 'data',
            '--cfg-options', f'train_dataloader.batch_size={batch_size}', *more]


def script(name, *words, **environment):
    """Run a shell script of tools/; exit code and output."""
    found = subprocess.run([TOOLS / f'{name}.sh', *words], env={**ON_CPU, **environment},
                           capture_output=True, text=True)
    return found.returncode, found.stdout + found.stderr


def state(folder, name, iteration):
    return load_checkpoint(folder / name / f'iter_{iteration}.pth')['state_dict']


@pytest.fixture(scope='module')
def steps(folder):
    """What one process learns: the weights after 1 and 3 iterations."""
    assert exit_code('tools/train.py', *options(folder, 'one')) == 0
    return {iteration: state(folder, 'one', iteration) for iteration in (1, 3)}


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return str(found.getsockname()[1])


def require_learned(found, expected, steps):
    """Weights are equal beside what three steps move them by."""
    assert found.keys() == expected.keys()
    moved = {key: (value - steps[1][key]).abs().max() for key, value in steps[3].items()
             if value.is_floating_point() and 'running_' not in key}
    assert all(step > 1e-6 for step in moved.values()), min(moved, key=moved.get)
    for key, step in moved.items():
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=1e-3 * step.item()), key


# --- the scripts ----------------------------------------------------------------------


@pytest.mark.long
def test_two_processes_learn_what_one_does(folder, steps):
    config, *more = options(folder, 'two', 2)
    code, output = script('dist_train', config, '2', *more, PORT=free_port())
    assert code == 0, output[-4000:]
    assert 'accuracy/top1' in output
    require_learned(state(folder, 'two', 3), steps[3], steps)


#: It starts as many processes as it is asked for, each with what Slurm says.
SRUN = f'''#!{sys.executable}
import os, subprocess, sys
words = sys.argv[1:]
count = int(next(word for word in words if word.startswith('--ntasks=')).partition('=')[2])
command = words[words.index('python'):]
print(words[:words.index('python')], flush=True)
running = [subprocess.Popen(command, env=dict(
    os.environ, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS=str(count),
    SLURM_NODELIST='here[1-2]')) for rank in range(count)]
sys.exit(max(process.wait() for process in running))
'''
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames here[1-2]" ] && echo 127.0.0.1 && echo here2\n'


def test_slurm(folder, steps, tmp_path):
    for name, content in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    config, _, work_dir, *more = options(folder, 'slurm', 2, 'train_cfg.max_iters=1')
    code, output = script(
        'slurm_train', 'part', 'a job', config, work_dir, *more, GPUS='2', GPUS_PER_NODE='2',
        SRUN_ARGS='--mem 1G', MASTER_PORT=free_port(), PATH=f'{tmp_path}:{ON_CPU["PATH"]}')
    assert code == 0, output[-4000:]
    assert str(['-p', 'part', '--job-name=a job', '--gres=gpu:2', '--ntasks=2',
                '--ntasks-per-node=2', '--cpus-per-task=5', '--kill-on-bad-exit=1', '--mem',
                '1G']) in output
    require_learned(state(folder, 'slurm', 1), steps[1], steps)


def test_what_the_scripts_pass_on(tmp_path):
    """To a `python` that only prints; every word as it was."""
    (tmp_path / 'python').write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    (tmp_path / 'python').chmod(0o755)
    found = {}
    for name, inputs in (('train', ['a config.py']), ('test', ['a config.py', 'a file.pth'])):
        code, output = script(f'dist_{name}', *inputs, '8', '--cfg-options', 'a=(1, 2)',
                              PATH=f'{tmp_path}:/usr/bin:/bin', NNODES='4', NODE_RANK='3',
                              MASTER_ADDR='there', PORT='1234')
        assert code == 0
        found[name] = [line[1:-1] for line in output.splitlines()]
        assert found[name] == [
            '-m', 'torch.distributed.run', '--nnodes=4', '--node_rank=3', '--master_addr=there',
            '--master_port=1234', '--nproc_per_node=8', str(TOOLS / f'{name}.py'), *inputs,
            '--launcher', 'pytorch', '--cfg-options', 'a=(1, 2)']


@pytest.mark.parametrize(('name', 'words'), [
    ('dist_train', []), ('dist_train', ['config.py']), ('dist_train', ['config.py', '--resume']),
    ('dist_test', ['config.py', 'file.pth']), ('dist_test', ['config.py', '8', '--tta']),
    ('slurm_train', ['part', 'job', 'config.py'])])
def test_wrong_arguments_show_the_usage(name, words):
    code, output = script(name, *words)
    assert code == 2
    assert 'usage' in output
    assert 'CONFIG' in output


# --- tools in two processes -------------------------------------------------------------


def test_test_and_reparam(folder, steps, tmp_path):
    """The main process compares and writes; all test."""
    def command(name, count, *words):
        return (f'tools/{name}.py', folder / 'config.py', folder / 'one' / 'iter_3.pth',
                '--data-root', folder / 'data', '--work-dir', tmp_path / f'{name}{count}', *words)

    def reparam(count, *words):
        return command('reparam', count, '--out', tmp_path / f'deployed{count}',
                       '--latency-rounds', 1, *words)

    launcher = '--launcher', 'pytorch'
    assert exit_code(*reparam(1)) == 0
    assert together(exit_codes, tmp_path / 'group', reparam(2, *launcher),
                    command('test', 2, *launcher)) == [[0, 0], [0, 0]]
    one, two = (json.loads((tmp_path / f'deployed{count}' / 'report.json').read_text())
                for count in (1, 2))
    assert one['metrics'] == two['metrics']
    assert two['verification']['passed']
    assert two['verification'].keys() == one['verification'].keys()
    tested = metrics_of_test(tmp_path / 'test2')
    assert {key: tested[key] for key in one['metrics']['training']} == one['metrics']['training']
    one, two = (load_checkpoint(tmp_path / f'deployed{count}' / 'model.pth')['state_dict']
                for count in (1, 2))
    assert all(torch.allclose(value, two[key], rtol=1e-6) for key, value in one.items())


def test_a_launcher_that_did_not_start_the_process(folder, capsys):
    assert exit_code('tools/train.py', *options(folder, 'none'), '--launcher', 'pytorch') == 1
    assert 'dist_train.sh' in capsys.readouterr().err
