# Half as wide, on small images: trains from scratch in minutes on a CPU, with
# --data-root.
_base_ = [
    'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py',
    '../_base_/orepa-r18-light.py'
]

scale = (320, 240)
crop_size = (192, 192)

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=crop_size),
    backbone=_base_.reparam.backbone,
    decode_head=dict(in_channels=_base_.reparam.channels, channels=64),
    auxiliary_head=dict(in_channels=128, channels=32))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize', scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=400, val_interval=100)
optim_wrapper = _base_.reparam.optim_wrapper
optim_wrapper['clip_grad']['_delete_'] = True  # the stock config has None
param_scheduler = _base_.reparam.param_scheduler
default_hooks = _base_.reparam.default_hooks
log_processor = _base_.reparam.log_processor
randomness = dict(seed=0)
