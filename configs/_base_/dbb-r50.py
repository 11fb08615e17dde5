_base_ = 'orepa.py'

reparam = dict(
    # its stem is no linear deep one
    optim_wrapper=dict(paramwise_cfg=dict(stem_lr_mult=1.0)),
    backbone=dict(
        type='DBBResNet',
        depth=50,
        # ImageNet weights in training form, see docs/transfer.md
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/dbb-resnet50_in1k.pth',
            prefix='backbone.')),
    channels=[256, 512, 1024, 2048])
