"""What two processes do in the tests of distributed training; forked, which saves the imports."""

import copy
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import torch
from batches import tiny_batch
from helpers import ROOT, exit_code, vary_scales
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch.utils.data import Dataset

from orepa_mm.engine import bare_model, build_runner
from orepa_mm.layers import reparam_layers
from orepa_mm.reparam import reparameterize

SIZE = 64
#: BN in eval mode: its statistics are those of a process's own batch.
BACKBONE = dict(base_channels=8, norm_eval=True, norm_cfg=dict(type='BN', requires_grad=True))
NECK = dict(in_channels=[8, 16, 32, 64], out_channels=16, conv_cfg=dict(type='OREPA'))
HEAD = dict(in_channels=16, feat_channels=16, stacked_convs=1)
GROUPS = dict(norm_cfg=dict(type='GN', num_groups=4, requires_grad=True), dropout_ratio=0,
              channels=16, num_classes=8)
CHANGES = {
    # the head is called at five levels and squeezed once
    'retinanet': dict(neck=NECK, bbox_head=dict(HEAD, num_classes=3, conv_cfg=dict(type='OREPA'))),
    'fcos': dict(neck=NECK, bbox_head=dict(HEAD, num_classes=3, norm_cfg=dict(
        type='GN', num_groups=4, requires_grad=True))),
    'faster_rcnn': dict(neck=NECK, rpn_head=dict(in_channels=16, feat_channels=16),
                        roi_head=dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(
                            in_channels=16, fc_out_channels=16, num_classes=3))),
    'upernet': dict(decode_head=dict(GROUPS, in_channels=[8, 16, 32, 64]),
                    auxiliary_head=dict(GROUPS, in_channels=32)),
}
LIGHT = {name: ROOT / 'configs' / path for name, path in {
    'retinanet': 'retinanet/retinanet_orepa-r18-light_fpn_400i_coco.py',
    'faster_rcnn': 'faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py',
    'upernet': 'upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py'}.items()}


def forked(function, *args):
    """Call a function in a process that begins with everything imported; the process."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['orepa_mm.workflow', 'mmengine.runner', 'mmdet.models',
                                    'mmseg.models', 'mmpretrain.models', 'mmcv.ops'])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def together(function, folder, *args, processes=2):
    """Call a function in processes of one group; what each returns, in the order of their ranks."""
    folder.mkdir()
    group = [forked(_member, function, folder, rank, processes, args)
             for rank in range(processes)]
    for process in group:
        process.join()
        assert process.exitcode == 0
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(processes)]


def _member(function, folder, rank, processes, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank,
                                         world_size=processes, timeout=timedelta(minutes=2))
    torch.save(function(*args), Path(folder, f'{rank}.pt'))
    torch.distributed.destroy_process_group()


@DATASETS.register_module(force=True)
class FourImages(Dataset):
    """Of `batch_of`."""

    def __init__(self, scope):
        self.batch = batch_of(scope)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {key: copy.deepcopy(values[index]) for key, values in self.batch.items()}


def batch_of(scope, same_boxes=False):
    """Four noise images with labels; boxes of other sizes, unless all have the same."""
    batch = tiny_batch(scope, SIZE, 4)
    if scope == 'mmdet':
        for index, sample in enumerate(batch['data_samples']):
            sample.gt_instances = sample.gt_instances[:1]
            side = 20 if same_boxes else (16, 30, 24, 40)[index]
            sample.gt_instances.bboxes = torch.tensor([[4., 4, side, side]])
            sample.gt_instances.labels = torch.tensor([index % 3])
    return batch


def exit_codes(*commands):
    """Of tools."""
    return [exit_code(*command) for command in commands]


def model_config(name):
    """Of a network in training form, a few channels wide."""
    cfg = Config.fromfile(LIGHT.get(name, LIGHT['retinanet']))
    if name == 'fcos':
        cfg.merge_from_dict(dict(model=dict(
            type='FCOS', train_cfg=None, bbox_head=dict(_delete_=True, type='FCOSHead'))))
    cfg.merge_from_dict(dict(model=dict(backbone=BACKBONE, **CHANGES[name])))
    return cfg


# --- gradients ----------------------------------------------------------------------


def compared_gradients(*cases):
    """Of each network, with boxes alike or not: both forms, in these processes and in one."""
    return {case: _compared_gradients(*case) for case in cases}


def _compared_gradients(name, same_boxes):
    cfg = model_config(name)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    vary_scales(model)
    if name != 'faster_rcnn':  # MMCV has no NMS in float64
        model = model.double()
    batch = batch_of(cfg.default_scope, same_boxes)
    rank = torch.distributed.get_rank()
    own = {key: value[rank::2] for key, value in batch.items()}  # as the sampler gives it
    found = {}
    for form, network in (('training', model), ('plain', reparameterize(model))):
        found[form, 1] = _gradients(network, network, batch)
        wrapped = MMDistributedDataParallel(network, broadcast_buffers=False)
        found[form, 2] = _gradients(network, wrapped, own)
    for processes in (1, 2):
        found['expected', processes] = _through_branches(model, found['plain', processes])
    return found


def _gradients(model, wrapped, batch):
    """{name: gradient} of everything that is trained; each has one."""
    model.zero_grad()
    torch.manual_seed(0)  # of the samplers of anchors and proposals
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    inputs = data['inputs'].to(next(model.parameters()).dtype)
    losses = wrapped(inputs, data['data_samples'], mode='loss')
    model.parse_losses(losses)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _through_branches(model, plain):
    """The gradients of a model that belong to these ones of its kernels."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    prefixes = {id(module): name for name, module in model.named_modules()}
    expected = dict(plain)
    for layer in reparam_layers(model):
        branches = [p for p in layer.parameters() if p is not layer.bias]
        found = torch.autograd.grad(layer.squeeze(), branches,
                                    expected.pop(f'{prefixes[id(layer)]}.weight'))
        expected.update({names[id(p)]: grad for p, grad in zip(branches, found)})
    return expected


# --- training -----------------------------------------------------------------------


def trained(work_dir, *cases):
    """Of each network and number of forward passes in a step: state and average after 3 steps."""
    return {case: _trained(Path(work_dir), *case) for case in cases}


def _trained(work_dir, name, passes):
    cfg, processes = model_config(name), torch.distributed.get_world_size()
    cfg.merge_from_dict(dict(
        work_dir=str(work_dir / f'{name}{passes}'), experiment_name=f'{name}{passes}',
        launcher='pytorch' if processes > 1 else 'none', randomness=dict(seed=0),
        val_cfg=None, val_dataloader=None, val_evaluator=None, test_cfg=None,
        test_dataloader=None, test_evaluator=None, param_scheduler=None,
        train_cfg=dict(max_iters=3 * passes), log_level='ERROR',
        custom_hooks=[dict(type='EMAHook', momentum=0.3)], default_hooks=dict(checkpoint=None),
        optim_wrapper=dict(
            _delete_=True, type='OptimWrapper', accumulative_counts=passes,
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4)),
        train_dataloader=dict(
            _delete_=True, batch_size=4 // processes // passes, num_workers=0,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
            dataset=dict(type='mmengine.FourImages', scope=cfg.default_scope))))
    init_default_scope(cfg.default_scope)
    runner = build_runner(cfg)
    before = copy.deepcopy(bare_model(runner).state_dict())
    runner.train()
    average, = (hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook))
    return {'before': before, 'after': bare_model(runner).state_dict(),
            'average': average.state_dict()}
