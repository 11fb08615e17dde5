_base_ = 'orepa-resnet18_8xb32_in1k.py'

model = dict(
    backbone=dict(stem_channels=96, base_channels=96),
    head=dict(in_channels=768))
