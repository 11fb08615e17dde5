_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='OREPAResNet',
        depth=50,
        # ImageNet weights in training form, see docs/transfer.md
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/orepa-resnet50_in1k.pth',
            prefix='backbone.')),
    channels=[256, 512, 1024, 2048])
