_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        type='OREPAResNeXt',
        depth=50,
        groups=32,
        base_width=4,
        # plain ImageNet weights, expanded on loading: see docs/transfer.md
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnext50_32x4d')),
    channels=[256, 512, 1024, 2048])
