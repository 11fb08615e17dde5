"""Two processes, however they share the parameters, compute what one does."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from two_processes import together

from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d, cached

#: By size the policy wraps two generators inside the stem, and a layer.
BY_SIZE = functools.partial(size_based_auto_wrap_policy, min_num_params=1000)


def fsdp(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device('cpu'), **options)


def fully_sharded(model, parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh('cpu', (2,))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


WAYS = {
    'ddp': nn.parallel.DistributedDataParallel, 'fsdp': fsdp,
    'fsdp by size': functools.partial(fsdp, auto_wrap_policy=BY_SIZE),
    'fsdp by size, original parameters': functools.partial(
        fsdp, auto_wrap_policy=BY_SIZE, use_orig_params=True),
    'fsdp2 by layer': lambda model: fully_sharded(model, [model[0], model[2], model[4]]),
    'fsdp2 by generator': lambda model: fully_sharded(model, model[0].generators),
}


def train(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        with cached():
            model(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(x)


def errors():
    """How far each way is from one process that has the whole batch."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(OREPAStemConv2d(3, 8, 7, 2, 3, bias=False), nn.ReLU(),
                          OREPAConv2d(8, 8, 3, padding=1), nn.ReLU(), OREPAConv1x1(8, 4)).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    mine = slice(2 * rank, 2 * rank + 2)
    before = model(x)[mine]
    expected = train(copy.deepcopy(model), x)[mine]
    found = {}
    for name, wrap in WAYS.items():
        try:
            y = train(wrap(copy.deepcopy(model)), x[mine])
            found[name] = ((y - expected).abs().max() / expected.abs().max()).item()
        except Exception as error:
            found[name] = f'{type(error).__name__}: {error}'
    moved = ((before - expected).abs().max() / expected.abs().max()).item()
    return found, moved


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    return together(errors, tmp_path_factory.mktemp('sharded') / 'group')


@pytest.mark.parametrize('way', WAYS)
def test_three_steps_and_an_evaluation(results, way):
    for found, moved in results:
        assert moved > 1e-3
        assert isinstance(found[way], float), found[way]
        assert found[way] < 1e-10
