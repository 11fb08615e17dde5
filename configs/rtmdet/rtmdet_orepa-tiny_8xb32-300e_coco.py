# The whole stock detector in training form, but for its predictions and attention,
# which have no BN. It starts from the stock config's weights, with its optimizer.
_base_ = ['mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', '../_base_/orepa.py']

model = dict(
    type='Expanded',
    model_type='RTMDet',
    expand=dict(
        conv_cfg=dict(type='OREPA'),
        include=['backbone.*', 'neck.*', 'bbox_head.*_convs.*'],
        exclude=['*.attention.*']))
optim_wrapper = dict(constructor='OREPAOptimWrapperConstructor')  # merges equal groups
