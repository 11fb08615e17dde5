_base_ = 'orepa-resnet50_8xb32_in1k.py'

model = dict(backbone=dict(type='OREPAResNeXt', groups=32, width_per_group=4))
