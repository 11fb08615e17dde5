# The paper's start: the authors' weights, converted (docs/transfer.md).
_base_ = 'mask-rcnn_orepa-r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='checkpoints/orepa-resnet50_in1k.pth', prefix='backbone.')))
