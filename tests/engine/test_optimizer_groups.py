"""Parameters with equal settings are one group; nothing else changes for any of them."""

import copy

import pytest
import torch
from helpers import ROOT, on_meta_device, randomize
from mmengine.config import Config
from mmengine.optim import LinearLR, MultiStepLR, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_run import ToyModel, toy_config

from orepa_mm.engine import build_runner
from orepa_mm.errors import CheckpointError
from orepa_mm.export import deploy_config
from orepa_mm.layers import OREPAConv2d, OREPAStemConv2d

OPTIMIZERS = {
    'SGD': dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.01),
    'AdamW': dict(type='AdamW', lr=0.1, weight_decay=0.01)}
#: Options of the parameters, and which of the optimizer's options to compare besides.
PARAMWISE = {
    'norm and bias': dict(norm_decay_mult=0., bias_decay_mult=0., bias_lr_mult=2.),
    'no option of effect': dict(dwconv_decay_mult=0.5),
    'custom keys': dict(norm_decay_mult=0., custom_keys={
        'conv': dict(lr_mult=0.5), 'conv.vector': dict(lr_mult=0.5, decay_mult=0.),
        'head': dict(lr_mult=0.1), 'head.bias': dict(lr_mult=0.1)}),
    'other options': dict(custom_keys={  # equal lists are different objects
        'conv': dict(betas=[0.8, 0.9], momentum=0.5), 'head': dict(betas=[0.8, 0.9], momentum=0.5),
        'bn': dict(betas=[0.8, 0.99], momentum=0.4)}),
    'shared': dict(norm_decay_mult=0., bypass_duplicate=True),
    'frozen': dict(norm_decay_mult=0., custom_keys={}),
}


def network(case=''):
    model = nn.Sequential()
    model.add_module('stem', OREPAStemConv2d(3, 8, 5, padding=2))
    model.add_module('conv', OREPAConv2d(8, 8, 3, padding=1, bias=False))
    if case == 'shared':
        model.add_module('again', nn.Sequential(model.conv))
    model.add_module('bn', nn.BatchNorm2d(8))
    model.add_module('head', nn.Conv2d(8, 2, 1))
    if case == 'frozen':
        model.stem.requires_grad_(False)
        model.bn.weight.requires_grad_(False)
    return randomize(model)


def wrapper_of(model, optimizer, paramwise, constructor='OREPAOptimWrapperConstructor'):
    return build_optim_wrapper(model, copy.deepcopy(dict(
        constructor=constructor, optimizer=optimizer, paramwise_cfg=paramwise)))


def settings(model, wrapper):
    """{parameter: all that its group holds}."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], {key: group[key] for key in group if key != 'params'})
             for group in wrapper.optimizer.param_groups for parameter in group['params']]
    assert len(found) == len(dict(found))
    return dict(found)


def course(model, wrapper):
    """Settings and weights in each of three steps of a scheduled training."""
    schedulers = [LinearLR(wrapper, start_factor=0.1, end=3, by_epoch=False),
                  MultiStepLR(wrapper, milestones=[2], by_epoch=False)]
    x, found = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), []
    for _ in range(3):
        wrapper.update_params(model(x).square().mean())
        for scheduler in schedulers:
            scheduler.step()
        found.append((settings(model, wrapper),
                      {name: value.clone() for name, value in model.state_dict().items()}))
    return found


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('case', PARAMWISE)
def test_every_parameter_is_treated_as_by_the_stock_constructor(case, optimizer):
    ours, stock = network(case), network(case)
    wrapper = wrapper_of(ours, OPTIMIZERS[optimizer], PARAMWISE[case])
    reference = wrapper_of(stock, OPTIMIZERS[optimizer], PARAMWISE[case],
                           'DefaultOptimWrapperConstructor')
    different = {repr(sorted(options.items())) for options in settings(stock, reference).values()}
    assert len(wrapper.optimizer.param_groups) == len(different) <= 5
    start = copy.deepcopy(ours.state_dict())
    for (found, weights), (expected, theirs) in zip(course(ours, wrapper),
                                                    course(stock, reference)):
        assert found == expected
        assert all('initial_lr' in options for options in found.values())
        for name, weight in weights.items():
            assert torch.equal(weight, theirs[name]), name
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained
    still = {name for name, _ in ours.named_parameters() if torch.equal(weights[name], start[name])}
    assert still == {name for name, _ in ours.named_parameters()} - trained


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_the_stem_learns_as_by_a_custom_key(optimizer):
    ours, stock = network(), network()
    wrapper = wrapper_of(ours, OPTIMIZERS[optimizer], dict(stem_lr_mult=0.1))
    assert len(wrapper.optimizer.param_groups) == 2
    reference = wrapper_of(stock, OPTIMIZERS[optimizer], dict(
        custom_keys={'stem': dict(lr_mult=0.1)}), 'DefaultOptimWrapperConstructor')
    for (found, weights), (expected, theirs) in zip(course(ours, wrapper),
                                                    course(stock, reference)):
        for name, options in expected.items():
            options.pop('lr_mult', None)
            assert found[name] == options, name
        assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items())


def test_groups_stay_in_the_order_of_their_first_parameters():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
                          nn.Conv2d(3, 3, 1, bias=False))
    groups = wrapper_of(model, OPTIMIZERS['SGD'], dict(
        norm_decay_mult=0., bias_lr_mult=2.)).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [[names[id(parameter)] for parameter in group['params']] for group in groups] == [
        ['0.weight', '0.bias', '2.weight', '2.bias'], ['1.weight', '3.weight'], ['1.bias']]


def test_not_merged_they_are_those_of_the_stock_constructor():
    model, paramwise = network(), dict(norm_decay_mult=0., bias_lr_mult=2.)
    stock = wrapper_of(model, OPTIMIZERS['SGD'], paramwise, 'DefaultOptimWrapperConstructor')
    ours = wrapper_of(model, OPTIMIZERS['SGD'], dict(merge_groups=False, **paramwise))
    assert ours.optimizer.state_dict() == stock.optimizer.state_dict()
    assert settings(model, ours) == settings(model, stock)
    assert len(wrapper_of(model, OPTIMIZERS['SGD'], dict(merge_groups=False)).param_groups) == 1


@pytest.mark.parametrize('merge', [True, False])
def test_a_shared_parameter_is_refused_by_its_names(merge):
    """Twice in one group it would be updated twice in each step, with a mere warning."""
    with pytest.raises(ValueError, match=(
            r'shared: conv\.(\w+) = again\.0\.\1,.*bypass_duplicate=True')):
        wrapper_of(network('shared'), OPTIMIZERS['SGD'],
                   dict(norm_decay_mult=0., merge_groups=merge))


@pytest.mark.parametrize('value', ['no', 1, None])
def test_an_option_that_is_none_is_an_error(value):
    with pytest.raises(ValueError, match='merge_groups must be True or False, got'):
        wrapper_of(network(), OPTIMIZERS['SGD'], dict(merge_groups=value))


def test_a_stock_config_does_without_the_option():
    cfg = Config(dict(model=dict(type='mmdet.ResNet', depth=18), optim_wrapper=dict(
        constructor='OREPAOptimWrapperConstructor',
        paramwise_cfg=dict(merge_groups=False, norm_decay_mult=0.))))
    assert deploy_config(cfg).optim_wrapper == dict(paramwise_cfg=dict(norm_decay_mult=0.))


@MODELS.register_module(force=True)
class GroupedToy(ToyModel):
    """Two groups, or six of one parameter each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


SCHEDULERS = [dict(type='LinearLR', start_factor=0.1, end=4, by_epoch=False),
              dict(type='PolyLR', eta_min=1e-4, begin=1, end=6, by_epoch=False),
              dict(type='MultiStepLR', milestones=[3, 5], end=6, by_epoch=False)]


def grouped_run(folder, name, max_iters=6, resume=False, **paramwise):
    torch.set_num_threads(1)
    cfg = toy_config(folder, max_iters=max_iters, resume=resume, experiment_name=f'groups-{name}',
                     param_scheduler=SCHEDULERS)
    cfg.model = dict(type='GroupedToy')
    cfg.optim_wrapper = dict(
        constructor='OREPAOptimWrapperConstructor', optimizer=OPTIMIZERS['SGD'],
        paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0., **paramwise))
    runner = build_runner(cfg)
    runner.train()
    return runner


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    return grouped_run(tmp_path_factory.mktemp('uninterrupted'), 'uninterrupted')


@pytest.mark.parametrize('merge', [True, False])
def test_a_run_goes_on_with_the_groups_it_had_only(uninterrupted, tmp_path, merge):
    """Against a run that was never stopped; a state of the other groups is refused."""
    name = f'{merge}-{tmp_path.name}'
    first = grouped_run(tmp_path, f'first-{name}', max_iters=2, merge_groups=merge)
    numbers = (2, 6) if merge else (6, 2)
    assert len(first.optim_wrapper.optimizer.param_groups) == numbers[0]
    with pytest.raises(CheckpointError, match=(
            rf'has {numbers[0]} parameter groups, that of this run {numbers[1]} for the same 6 '
            rf'parameters.*--cfg-options optim_wrapper.paramwise_cfg.merge_groups={merge}')):
        grouped_run(tmp_path, f'refused-{name}', resume=True, merge_groups=not merge)
    resumed = grouped_run(tmp_path, f'resumed-{name}', resume=True, merge_groups=merge)
    assert resumed.iter == uninterrupted.iter == 6
    for key, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], weight), key
    assert settings(resumed.model, resumed.optim_wrapper) == settings(
        uninterrupted.model, uninterrupted.optim_wrapper)
    lines = (tmp_path / 'progress').read_text().split()[1::2]
    assert lines == ['0', '1', '2', '3', '4', '5']


def test_a_state_of_other_rules_or_of_another_model():
    model, sgd = network(), OPTIMIZERS['SGD']
    state = wrapper_of(model, sgd, dict(bias_lr_mult=2., norm_decay_mult=0.)).state_dict()
    with pytest.raises(CheckpointError, match='take the paramwise_cfg that it had'):
        wrapper_of(model, sgd, dict(norm_decay_mult=0.)).load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match='different number of parameter groups') as error:
        wrapper_of(nn.Linear(2, 2), sgd, dict(norm_decay_mult=0.)).load_state_dict(state)
    assert not isinstance(error.value, CheckpointError)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_state_of_as_many_groups_but_others(optimizer):
    """PyTorch would give parameters the momentum of others."""
    model = network()
    saved = wrapper_of(model, OPTIMIZERS[optimizer], dict(norm_decay_mult=0.))
    course(model, saved)
    other = wrapper_of(model, OPTIMIZERS[optimizer], dict(bias_decay_mult=0.))
    with pytest.raises(CheckpointError, match=r'but others in them.*the paramwise_cfg that it had'):
        other.load_state_dict(saved.state_dict())
    wrapper_of(model, OPTIMIZERS[optimizer], dict(norm_decay_mult=0.)).load_state_dict(
        saved.state_dict())


class Operations(TorchDispatchMode):
    """Names of the operations that compute: views and the profiler's marks are left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != 'profiler':
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def step_of(path, **optimizer):
    """Groups, and operations of the second step, of the config's detector without its memory."""
    cfg = Config.fromfile(ROOT / 'configs' / path)
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope('mmdet')
    with on_meta_device():
        model = MODELS.build({**cfg.model, '_scope_': 'mmdet'})
    cfg.optim_wrapper.optimizer.update(optimizer)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    wrapper.step()  # makes the buffers
    with Operations() as operations:
        wrapper.step()
    return wrapper.param_groups, operations.names


def test_budget_of_a_detector():
    """On a GPU `foreach` is the default; groups of one parameter took 1289 operations."""
    groups, operations = step_of('faster_rcnn/faster-rcnn_orepa-r50_fpn_1x_coco.py', foreach=True)
    assert len(groups) <= 8
    assert len(operations) <= 60
    assert sum(name.startswith('aten::_foreach') for name in operations) >= 2
