_base_ = 'orepa-repvgg-A0_8xb32_in1k.py'

model = dict(backbone=dict(conv_cfg=dict(type='OREPA', block='repvgg_online')))
