_base_ = ['mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', '../_base_/orepa-r18.py']

model = dict(pretrained=None, backbone=_base_.reparam.backbone)
optim_wrapper = _base_.reparam.optim_wrapper
