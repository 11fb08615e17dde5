"""Two processes average their gradients: they learn what one learns from both their batches."""

import os

import pytest
import torch
from helpers import ROOT, run

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
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2)
ON_CPU = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """{(processes, iterations): state dict}; both runs start from the same seed."""
    folder = tmp_path_factory.mktemp('processes')
    make_shapes_imagenet(folder / 'data', 12, 12, 64)
    (folder / 'config.py').write_text(CONFIG)
    found = {}
    for processes, start, more in [(1, (), ()), (2, TORCHRUN, ('--launcher', 'pytorch'))]:
        work_dir = folder / f'train{processes}'
        output = run(*start, 'tools/train.py', folder / 'config.py', '--work-dir', work_dir,
                     '--data-root', folder / 'data', *more, '--cfg-options',
                     f'train_dataloader.batch_size={4 // processes}', env=ON_CPU)
        assert 'accuracy/top1' in output
        for iteration in (1, 3):
            checkpoint = load_checkpoint(work_dir / f'iter_{iteration}.pth')
            found[processes, iteration] = checkpoint['state_dict']
    return found


def test_two_processes_learn_what_one_does(weights):
    one, two = weights[1, 3], weights[2, 3]
    assert one.keys() == two.keys()
    moved = {key: (value - weights[1, 1][key]).abs().max() for key, value in one.items()
             if value.is_floating_point() and 'running_' not in key}
    assert all(step > 1e-6 for step in moved.values()), min(moved, key=moved.get)
    for key, step in moved.items():
        assert torch.allclose(two[key], one[key], rtol=1e-5, atol=1e-3 * step.item()), key
