_base_ = 'faster-rcnn_orepa-r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        depth=18,
        init_cfg=dict(checkpoint='checkpoints/orepa-resnet18_in1k.pth')),
    neck=dict(in_channels=[64, 128, 256, 512]))
