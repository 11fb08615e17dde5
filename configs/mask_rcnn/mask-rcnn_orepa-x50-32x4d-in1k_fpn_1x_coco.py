# The paper's start: the authors' weights, converted (docs/transfer.md).
_base_ = 'mask-rcnn_orepa-x50-32x4d_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='checkpoints/orepa-resnext50-32x4d_in1k.pth', prefix='backbone.')))
