# The paper's start: the authors' weights, converted (docs/transfer.md).
_base_ = 'deeplabv3plus_orepa-r18-d8_4xb2-80k_cityscapes-512x1024.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='checkpoints/orepa-resnet18_in1k.pth', prefix='backbone.')))
