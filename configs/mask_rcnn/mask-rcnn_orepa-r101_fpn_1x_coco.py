_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/orepa-r101.py']

model = dict(backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
