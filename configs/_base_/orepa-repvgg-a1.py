_base_ = 'orepa.py'

reparam = dict(
    backbone=dict(
        _delete_=True,
        type='OREPARepVGG',
        arch='A1',
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        # ImageNet weights in training form (torchvision has no plain ones):
        # see docs/transfer.md
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/orepa-repvgg-A1_in1k.pth',
            prefix='backbone.')),
    channels=[64, 128, 256, 1280])
