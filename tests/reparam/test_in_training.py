"""Re-parameterizing in the middle of training: whatever is around the model, it goes on."""

import copy

import pytest
import torch
from helpers import randomize, relative_error
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from torch import nn
from torch.nn.parallel import DataParallel

from orepa_mm.layers import DBBConv2d, OREPAConv2d, OREPAStemConv2d
from orepa_mm.reparam import is_training_form, reparameterize, verify


class Net(nn.Module):
    """Stem, blocks with BN, a head."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = OREPAStemConv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn = norm(8)
        self.blocks = nn.Sequential(
            OREPAConv2d(8, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
            DBBConv2d(8, 8, 3, padding=1))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.blocks(self.bn(self.stem(x)).relu()))


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def train(model, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()


def half_trained(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = randomize(Net(norm)).train()
    train(model)
    return model


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_function(before, after):
    assert not is_training_form(after)
    report = verify(before, after, images())
    assert report.passed, report.explain()
    before, after = copy.deepcopy(before).eval(), copy.deepcopy(after).eval()
    with torch.no_grad():
        assert relative_error(after(images()), before(images())) < 1e-5


@pytest.mark.parametrize('fold_bn', [False, True])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_half_trained_bn(norm, fold_bn):
    model = half_trained(nn.BatchNorm2d)
    if norm is nn.SyncBatchNorm:  # which trains on a GPU only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    before = snapshot(model)
    after = reparameterize(model, fold_bn=fold_bn)
    assert all(module.training for module in after.modules())
    assert_same_function(model, after)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and fold_bn
                   for m in after.modules())


def test_moving_averages():
    """Both the model and its average, in the middle of the run; neither is touched."""
    ends = []
    for convert in (False, True):
        model = half_trained()
        ema = ExponentialMovingAverage(model, momentum=0.5, update_buffers=True)
        for step in range(3):
            train(model)
            ema.update_parameters(model)
            if convert and step:
                averaged, current = reparameterize(ema), reparameterize(model)
                assert_same_function(ema.module, averaged.module)
                assert_same_function(model, current)
                assert relative_error(averaged.module.stem.weight, current.stem.weight) > 1e-4
        ends.append({**model.state_dict(), **ema.state_dict()})
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0,
                                         world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('wrap', [
    nn.parallel.DistributedDataParallel,
    lambda model: MMDistributedDataParallel(model, broadcast_buffers=False), DataParallel])
def test_wrapped_for_distributed_training(process_group, wrap):
    model = half_trained()
    wrapped = wrap(model)
    after = reparameterize(wrapped)
    assert type(after) is Net
    assert_same_function(model, after)
    assert verify(wrapped, after, images()).passed
    train(wrapped)  # goes on
    assert is_training_form(wrapped)
    assert reparameterize(wrapped, inplace=True) is model
    assert not is_training_form(model)


def test_wrapped_inside(process_group):
    """As MMSeparateDistributedDataParallel does with each part of a model."""
    model = half_trained()
    separate = copy.deepcopy(model)
    separate.blocks = nn.parallel.DistributedDataParallel(separate.blocks)
    after = reparameterize(separate)
    assert type(after.blocks) is nn.Sequential
    assert after.state_dict().keys() == reparameterize(model).state_dict().keys()
    assert_same_function(model, after)


def test_sharded_parameters_are_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match='full state dict'):
        reparameterize(FullyShardedDataParallel())


@pytest.mark.parametrize(('how', 'inplace'), [
    ('wrapper', False), ('wrapper', True), ('in place', True), ('method', False),
    ('inside', False), ('single layer', True)])
def test_after_torch_compile(how, inplace):
    """The code that was compiled belongs to the training form: none of it may run afterwards."""
    torch.compiler.reset()
    model = half_trained()
    if how == 'single layer':
        model = model.blocks[0]
    before, calls = copy.deepcopy(model), []

    def backend(graph, example_inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)
        return run

    if how in ('wrapper', 'single layer'):
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        if how == 'in place':
            model.compile(backend=backend)
        elif how == 'method':  # as MMEngine's Runner(compile=...) does
            model.forward = torch.compile(model.forward, backend=backend)
        else:
            model.blocks = torch.compile(model.blocks, backend=backend)
    x = images() if how != 'single layer' else torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        compiled.eval()
        expected = before.eval()(x)
        assert relative_error(compiled(x), expected) < 1e-5
        assert calls
        after = reparameterize(compiled, inplace=inplace)
        assert type(after) is (nn.Conv2d if how == 'single layer' else Net)
        assert not is_training_form(after)
        calls.clear()
        for parameter in after.parameters():  # the original must not answer for it
            parameter.mul_(2)
        assert relative_error(after(x), expected) > 0.1
        assert not calls
        for parameter in after.parameters():
            parameter.div_(2)
        assert relative_error(after(x), expected) < 1e-5
        again = torch.compile(after, backend=backend)
        assert relative_error(again(x), expected) < 1e-5


def test_switch_to_deploy_of_the_backbone_and_then_of_the_model():
    """As mmdeploy does, for models that have the method."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = MODELS.build(dict(type='OREPAResNet', depth=18, base_channels=8))
            self.neck = OREPAConv2d(64, 8, 3, padding=1)

        def forward(self, x):
            return self.neck(self.backbone(x)[-1])

        def switch_to_deploy(self):
            reparameterize(self, inplace=True)

    model = randomize(Model()).eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        model.backbone.switch_to_deploy()
        assert is_training_form(model)  # the neck
        model.switch_to_deploy()
        model.switch_to_deploy()
        assert not is_training_form(model)
        assert relative_error(model(x), expected) < 1e-10
