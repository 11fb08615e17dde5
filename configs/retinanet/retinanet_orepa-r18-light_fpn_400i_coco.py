# Trains from scratch in minutes on a CPU, with --data-root.
_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    '../_base_/orepa-r18-light.py'
]

model = dict(
    backbone=_base_.reparam.backbone,
    neck=dict(in_channels=_base_.reparam.channels, out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=2))
train_dataloader = _base_.reparam.train_dataloader
val_dataloader = _base_.reparam.val_dataloader
test_dataloader = val_dataloader
train_cfg = _base_.reparam.train_cfg
optim_wrapper = _base_.reparam.optim_wrapper
param_scheduler = _base_.reparam.param_scheduler
default_hooks = _base_.reparam.default_hooks
log_processor = _base_.reparam.log_processor
randomness = dict(seed=0)
