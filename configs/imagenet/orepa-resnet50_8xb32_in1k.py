_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py', '../_base_/imagenet_120e.py']

model = dict(backbone=dict(type='OREPAResNet'))
optim_wrapper = _base_.reparam.optim_wrapper
param_scheduler = _base_.reparam.param_scheduler
train_cfg = dict(max_epochs=_base_.reparam.max_epochs)
