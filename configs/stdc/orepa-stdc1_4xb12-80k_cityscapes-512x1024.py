# The whole stock segmentor in training form, but for its predictions and attention.
# It starts from scratch and with the stock optimizer, as the stock config does.
_base_ = ['mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', '../_base_/orepa.py']

model = dict(
    type='Expanded',
    model_type='EncoderDecoder',
    expand=dict(
        conv_cfg=dict(type='OREPA'),
        exclude=['*.conv_seg', '*.attention.*', '*.atten_conv_layer.*']))
