_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='OREPAResNet',
        depth=18,
        # plain ImageNet weights, expanded on loading: see docs/transfer.md
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    channels=[64, 128, 256, 512])
