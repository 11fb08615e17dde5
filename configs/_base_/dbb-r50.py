_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='DBBResNet',
        depth=50,
        # ImageNet weights in training form (plain ones cannot be expanded):
        # see docs/transfer.md
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/dbb-resnet50_in1k.pth',
            prefix='backbone.')),
    channels=[256, 512, 1024, 2048])
