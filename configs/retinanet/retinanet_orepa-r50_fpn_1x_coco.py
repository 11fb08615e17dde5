_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/orepa-r50.py']

model = dict(backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
