_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='OREPAResNet',
        depth=101,
        # plain ImageNet weights, expanded on loading: see docs/transfer.md
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101')),
    channels=[256, 512, 1024, 2048])
