# The authors' ImageNet recipe, on top of MMPretrain's (SGD, lr 0.1, batch 256,
# momentum 0.9, weight decay 1e-4). Picked from by `_base_.reparam`.
_base_ = 'orepa.py'

reparam = dict(
    _delete_=True,
    optim_wrapper=dict(
        constructor='OREPAOptimWrapperConstructor',  # merges equal groups
        paramwise_cfg=dict(
            norm_decay_mult=0.0,
            custom_keys={'bias': dict(lr_mult=2.0, decay_mult=0.0)})),
    # linear warm-up over 1/24 of the epochs, then cosine
    param_scheduler=[
        dict(
            type='LinearLR',
            start_factor=1e-3,
            by_epoch=True,
            begin=0,
            end=5,
            convert_to_iter_based=True),
        dict(
            type='CosineAnnealingLR',
            T_max=115,
            by_epoch=True,
            begin=5,
            end=120,
            convert_to_iter_based=True)
    ],
    max_epochs=120)
