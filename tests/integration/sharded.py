"""What two processes do that share a model out, in every way PyTorch has."""

import torch
from helpers import randomize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from orepa_mm.layers import (
    DBBConv2d,
    OREPAConv1x1,
    OREPAConv2d,
    OREPARepVGGConv2d,
    OREPAStemConv2d,
    reparam_layers,
)

WAYS = ('DDP', 'FSDP1', 'FSDP2 by stage', 'FSDP2 by layer')
BATCH = 4


def network():
    """A layer of every kind; BN in eval mode, whose statistics are those of a process's batch."""
    model = nn.Sequential(
        nn.Sequential(OREPAStemConv2d(3, 8, 7, stride=2, padding=3), nn.GroupNorm(2, 8)),
        nn.Sequential(OREPAConv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), OREPAConv1x1(8, 8, 1)),
        nn.Sequential(OREPARepVGGConv2d(8, 8, 3, padding=1), DBBConv2d(8, 8, 3, padding=1)))
    return randomize(model).double()


def train(model):
    """In training mode, but for the BN of DBB."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def steps(way=None):
    """Outputs in eval mode before, between and after three steps, on all images."""
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    wanted = torch.randn(BATCH, 8, 8, 8, dtype=torch.float64)
    model = wrapped(network(), way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    own = slice(None) if way is None else slice(torch.distributed.get_rank(), None, 2)
    found = []
    for _ in range(4):
        model.eval()
        with torch.no_grad():
            found.append(model(images).clone())
        train(model)
        optimizer.zero_grad()
        (model(images[own]) - wanted[own]).square().mean().backward()
        optimizer.step()
    return torch.stack(found)


def wrapped(model, way):
    if way == 'DDP':
        return DistributedDataParallel(model)
    if way == 'FSDP1':
        return FullyShardedDataParallel(model, use_orig_params=True,
                                        device_id=torch.device('cpu'))
    if way is not None:
        mesh = init_device_mesh('cpu', (2,))
        parts = model if 'stage' in way else reparam_layers(model)
        for part in [*parts, model]:
            fully_shard(part, mesh=mesh)
    return model


def all_ways():
    return {way: steps(way) for way in WAYS}
