_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/orepa-r18.py']

model = dict(
    backbone=_base_.reparam.backbone,
    neck=dict(in_channels=_base_.reparam.channels))
optim_wrapper = _base_.reparam.optim_wrapper
