_base_ = ['mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py', '../_base_/orepa-r18.py']

model = dict(pretrained=None, backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
