_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='OREPAResNeXt',
        depth=50,
        groups=32,
        base_width=4,
        # ImageNet weights in training form, see docs/transfer.md
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/orepa-resnext50-32x4d_in1k.pth',
            prefix='backbone.')),
    channels=[256, 512, 1024, 2048])
