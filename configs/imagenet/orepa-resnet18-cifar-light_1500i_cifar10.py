# An eighth as wide, on images of 32 x 32 in the layout of ImageNet: trains
# from scratch in minutes on a CPU, with --data-root. See docs/results.md.
_base_ = 'orepa-resnet18-light_300i_in1k.py'

model = dict(
    backbone=dict(
        type='OREPAResNet_CIFAR', stem_channels=8, base_channels=8),
    head=dict(in_channels=64))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=250, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=1500, val_interval=500)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=75),
    dict(type='CosineAnnealingLR', by_epoch=False)
]
default_hooks = dict(checkpoint=dict(interval=500))
