"""Validation of averaged weights: kernels are those of the averages."""

import pytest
import torch
from helpers import expected_output, relative_error
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from orepa_mm.layers import OREPAConv2d, OREPAStemConv2d


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index)))


class Net(BaseModel):
    """In each validation, how far its output is from that of kernels squeezed from scratch."""

    def __init__(self, frozen):
        super().__init__()
        self.stem, self.conv = OREPAStemConv2d(3, 4, 5), OREPAConv2d(4, 4, 3)
        self.stem.requires_grad_(not frozen)
        self.errors, self.outputs = [], []

    def forward(self, inputs, mode='tensor', **kwargs):
        y = self.conv(self.stem(torch.stack(list(inputs))))
        if mode == 'loss':
            return dict(loss=y.square().mean())
        x = torch.stack(list(inputs))
        self.errors.append(relative_error(y, expected_output(
            self.conv, expected_output(self.stem, x))))
        self.outputs.append(y.detach())
        return [y]


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'nothing': 0.0}


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_the_kernels_of_a_validation_are_those_of_the_averages(tmp_path, by_epoch, frozen):
    """The hook exchanges the weights through `.data`, which no version counter sees."""
    model = Net(frozen)
    loader = dict(dataset=Images(), batch_size=2, num_workers=0,
                  sampler=dict(type='DefaultSampler', shuffle=False))
    runner = Runner(
        model, str(tmp_path), train_dataloader=loader, val_dataloader=loader,
        train_cfg=dict(by_epoch=by_epoch, **(dict(max_epochs=3) if by_epoch else dict(
            max_iters=6, val_interval=2))),
        val_cfg=dict(), val_evaluator=[Nothing()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[dict(type='EMAHook', momentum=0.5)],
        default_hooks=dict(logger=None, checkpoint=None), experiment_name=tmp_path.name,
    )
    runner.train()
    assert len(model.errors) == 6
    model.eval()
    with torch.no_grad():
        last = model([Images()[0]['inputs']])[0]
    runner.val_loop.run()
    assert max(model.errors) < 1e-5
    assert not torch.allclose(model.outputs[-2][:1], last)
