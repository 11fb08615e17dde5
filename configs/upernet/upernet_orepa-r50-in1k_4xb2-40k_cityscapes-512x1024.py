# The paper's start: the authors' weights, converted (docs/transfer.md).
_base_ = 'upernet_orepa-r50_4xb2-40k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='checkpoints/orepa-resnet50_in1k.pth', prefix='backbone.')))
