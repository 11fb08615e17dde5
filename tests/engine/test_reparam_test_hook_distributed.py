"""Validation with the deployed form in two processes: they decide alike."""

import os
from pathlib import Path

from helpers import run

#: Process 1 converts wrongly. Only a collective decision lets both stop.
TWO_PROCESSES = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
from small_run import OURS, build
from orepa_mm.engine import reparam_test_hook
from orepa_mm.reparam import reparameterize
from orepa_mm.errors import VerificationError

torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
if rank == 1:
    def broken(model):
        model = reparameterize(model)
        with torch.no_grad():
            model.backbone[4].weight.mul_(1.5)
        return model
    reparam_test_hook.reparameterize = broken
runner = build(Path(sys.argv[1]), dict(OURS, stop_on_difference=True))
try:
    runner.train()
except VerificationError as error:
    print(f'process {rank} stopped at epoch {runner.epoch}: {error}', flush=True)
torch.distributed.destroy_process_group()
"""


def test_all_processes_stop_together(tmp_path):
    (tmp_path / 'both.py').write_text(TWO_PROCESSES)
    output = run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2,
                 tmp_path / 'both.py', tmp_path / 'run', Path(__file__).parent,
                 Path(__file__).parent.parent, timeout=120,
                 env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'})
    for rank in range(2):
        assert (f'process {rank} stopped at epoch 1: process 1: THE DEPLOYED FORM DIFFERS from '
                'the training form on batch 0') in output
    assert 'process 0: THE' not in output
