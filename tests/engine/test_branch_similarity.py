"""What the hook logs about branches, against numpy, in a run with every kind of layer."""

import json
import logging
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import vary_scales
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy_run import toy_config

from orepa_mm.engine import BranchSimilarityHook, branch_similarity, build_runner
from orepa_mm.layers import DBBConv2d, OREPAConv1x1, OREPAConv2d, OREPAStemConv2d


@MODELS.register_module(force=True)
class ToyBranches(BaseModel):
    """The stem is frozen; without branches, a plain convolution."""

    def __init__(self, plain=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1)) if plain else nn.Sequential(
            OREPAStemConv2d(4, 4, 5, padding=2), OREPAConv2d(4, 4, 3, padding=1),
            OREPAConv1x1(4, 6), DBBConv2d(6, 4, 3, padding=1))
        if not plain:
            vary_scales(self)
            self.layers[0].requires_grad_(False)

    def forward(self, inputs, mode='tensor'):
        output = self.layers(inputs[..., None, None].expand(-1, -1, 3, 3))
        return dict(loss=output.square().mean()) if mode == 'loss' else output


def trained(folder, plain=False, interval=2, **kwargs):
    torch.set_num_threads(1)
    cfg = toy_config(folder, experiment_name=folder.name, **kwargs)
    cfg.model = dict(type='ToyBranches', plain=plain)
    cfg.visualizer = dict(type='Visualizer', name=folder.name, vis_backends=[
        dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])
    cfg.custom_hooks = [dict(type='BranchSimilarityHook', interval=interval), dict(type='EMAHook')]
    runner = build_runner(cfg)
    runner.train()
    return runner


def expected(layers):
    """The means of these layers, by tag."""
    similarity, share = [], {}
    for layer in layers:
        kernels = [kernel.numpy().ravel() for kernel in layer.branch_kernels().values()]
        cosines = np.corrcoef(np.concatenate([kernels, -np.asarray(kernels)], axis=1))
        similarity.append(np.mean(np.abs(cosines[np.triu_indices(len(kernels), 1)])))
        total = np.sum(kernels, axis=0)
        for name, kernel in zip(layer.branch_names, kernels):
            share.setdefault(name, []).append(np.dot(kernel, total) / np.dot(total, total))
    return {'branch_similarity': np.mean(similarity),
            **{f'branch_share/{name}': np.mean(values) for name, values in share.items()}}


def scalars_of(folder):
    """What a run wrote of ours: [(step, {tag: value})]."""
    path, = Path(folder).glob('*/vis_data/scalars.json')
    found = [(entry.pop('step'), {tag: value for tag, value in entry.items() if 'branch' in tag})
             for entry in map(json.loads, path.read_text().splitlines())]
    return [(step, entry) for step, entry in found if entry]


def test_logged_in_files_and_for_tensorboard(tmp_path):
    runner = trained(tmp_path)
    ema, = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    stem, kxk, pointwise, dbb = runner.model.layers
    wanted = expected([*stem.generators, kxk, pointwise, dbb])
    averaged = ema.ema_model.module.layers
    assert wanted != pytest.approx(expected([*averaged[0].generators, *averaged[1:]]))
    scalars = scalars_of(tmp_path)
    assert [step for step, _ in scalars] == [2, 4, 6]
    assert scalars[-1][1] == pytest.approx(wanted)
    assert scalars[0][1] != scalars[-1][1]

    events = EventAccumulator(str(next(tmp_path.glob('*/vis_data')))).Reload()
    assert {tag for tag in events.Tags()['scalars'] if 'branch' in tag} == wanted.keys()
    for tag, value in wanted.items():
        assert [event.step for event in events.Scalars(tag)] == [2, 4, 6]
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-5)


def test_a_model_without_branches_warns_once(tmp_path):
    with mock.patch.object(branch_similarity, 'print_log') as print_log:
        trained(tmp_path, plain=True)
    (message, _, level), = (call.args for call in print_log.call_args_list)
    assert 'no layer with branches' in message
    assert level == logging.WARNING
    assert scalars_of(tmp_path) == []


class Runner:
    def __init__(self, model):
        self.model, self.iter, self.visualizer = model, 0, mock.Mock()

    def run(self, hook, iterations=1):
        hook.before_train(self)
        for _ in range(iterations):
            hook.before_train_iter(self, self.iter)
            hook.after_train_iter(self, self.iter)
            self.iter += 1
        return self.visualizer.add_scalars.call_args_list


def test_nothing_is_squeezed_at_other_iterations_or_in_other_processes():
    layer = OREPAConv2d(4, 4, 3)
    with mock.patch.object(OREPAConv2d, 'branch_kernels',
                           side_effect=layer.branch_kernels) as kernels:
        logged = Runner(layer).run(BranchSimilarityHook(3), 8)
        assert [call.kwargs['step'] for call in logged] == [3, 6]
        assert kernels.call_count == 2
        with mock.patch.object(branch_similarity, 'is_main_process', return_value=False):
            assert not Runner(layer).run(BranchSimilarityHook(3), 8)
        assert kernels.call_count == 2


def test_a_wrapped_model():
    layer = OREPAConv1x1(4, 4)
    logged, = Runner(nn.DataParallel(layer)).run(BranchSimilarityHook(1))
    assert logged.args[0] == pytest.approx(expected([layer]))


def test_what_is_not_defined_is_left_out():
    """At the start of `single_init` no two branches have a direction."""
    layer = OREPAConv1x1(4, 4, single_init=True)
    logged, = Runner(layer).run(BranchSimilarityHook(1))
    assert logged.args[0] == {'branch_share/origin': 1, 'branch_share/product': 0}


@pytest.mark.parametrize('interval', [0, -1, 1.5, True, '50'])
def test_intervals(interval):
    with pytest.raises(ValueError, match='interval must be a positive integer'):
        BranchSimilarityHook(interval)
