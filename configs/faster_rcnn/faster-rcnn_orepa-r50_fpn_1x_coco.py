_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/orepa.py']

model = dict(
    backbone=dict(
        type='OREPAResNet',
        # ImageNet weights in training form; see "Pretrained weights" in the README
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='checkpoints/orepa-resnet50_in1k.pth',
            prefix='backbone.')))
