_base_ = 'orepa-resnet18_8xb32_in1k.py'

model = dict(
    backbone=dict(stem_channels=128, base_channels=128),
    head=dict(in_channels=1024))
