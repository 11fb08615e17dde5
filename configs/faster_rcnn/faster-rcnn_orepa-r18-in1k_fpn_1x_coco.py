# The paper's start: the authors' weights, converted (docs/transfer.md).
_base_ = 'faster-rcnn_orepa-r18_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='checkpoints/orepa-resnet18_in1k.pth', prefix='backbone.')))
