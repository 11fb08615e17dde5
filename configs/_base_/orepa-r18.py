_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='OREPAResNet',
        depth=18,
        # ImageNet weights in training form, see docs/transfer.md
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/orepa-resnet18_in1k.pth',
            prefix='backbone.')),
    channels=[64, 128, 256, 512])
