_base_ = ['mmpretrain::repvgg/repvgg-A0_8xb32_in1k.py', '../_base_/imagenet_120e.py']

model = dict(backbone=dict(type='OREPARepVGG'))
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True, **_base_.reparam.optim_wrapper.paramwise_cfg))
param_scheduler = _base_.reparam.param_scheduler
train_cfg = dict(max_epochs=_base_.reparam.max_epochs)
