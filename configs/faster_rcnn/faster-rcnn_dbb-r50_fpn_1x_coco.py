_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/dbb-r50.py']

model = dict(backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
