_base_ = ['mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py', '../_base_/dbb-r50.py']

model = dict(pretrained=None, backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
