# Half as wide, on small images, from scratch: trains in minutes on a CPU.
_base_ = 'orepa-r18.py'

reparam = dict(
    backbone=dict(base_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None),
    channels=[32, 64, 128, 256],
    rpn_head=dict(in_channels=64, feat_channels=64),
    train_cfg_of_model=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg_of_model=dict(rpn=dict(nms_pre=300, max_per_img=100)),
    train_dataloader=dict(
        batch_size=4,
        num_workers=1,
        sampler=dict(type='InfiniteSampler'),
        dataset=dict(pipeline=[
            dict(type='LoadImageFromFile', backend_args=None),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(256, 256), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs')
        ])),
    val_dataloader=dict(
        num_workers=1,
        dataset=dict(pipeline=[
            dict(type='LoadImageFromFile', backend_args=None),
            dict(type='Resize', scale=(256, 256), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                           'scale_factor'))
        ])),
    train_cfg=dict(
        _delete_=True, type='IterBasedTrainLoop', max_iters=400, val_interval=100),
    optim_wrapper=dict(
        optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.01),
        clip_grad=dict(max_norm=10)),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
        # down to zero at the last iteration, whichever train_cfg.max_iters says
        dict(type='CosineAnnealingLR', by_epoch=False)
    ],
    default_hooks=dict(
        logger=dict(interval=10, log_metric_by_epoch=False),
        checkpoint=dict(
            type='WholeCheckpointHook',
            by_epoch=False,
            interval=100,
            max_keep_ckpts=1)),
    log_processor=dict(by_epoch=False, window_size=10))
