# A RepVGG with A0's widths, a quarter as wide and half as deep, on images of 32 x 32:
# trains from scratch in minutes on a CPU, with --data-root. See docs/results.md.
_base_ = 'orepa-resnet18-cifar-light_1500i_cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='OREPARepVGG',
        arch=dict(
            num_blocks=[2, 2, 7, 1],
            width_factor=[0.75, 0.75, 0.75, 2.5],
            group_layer_map=None,
            se_cfg=None),
        base_channels=16,
        strides=(1, 2, 2, 2),
        out_indices=(3, )),
    head=dict(in_channels=320))
