# The light config, starting from pretrained weights: see docs/transfer.md.
_base_ = 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='checkpoints/orepa-resnet18-light_in1k.pth',
            prefix='backbone.')))
