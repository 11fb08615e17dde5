_base_ = ['mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py', '../_base_/orepa-r50.py']

model = dict(pretrained=None, backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
