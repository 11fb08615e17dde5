# Makes the layers, backbones and the optimizer constructor known to any OpenMMLab config.
custom_imports = dict(imports=['orepa_mm'], allow_failed_imports=False)

# What the configs of one backbone share; they pick from it by `_base_.reparam`.
reparam = dict(
    # Weight decay as the authors': of the scaling vectors, not of BN and biases.
    # stem_lr_mult: see docs/transfer.md.
    optim_wrapper=dict(
        constructor='OREPAOptimWrapperConstructor',
        paramwise_cfg=dict(
            stem_lr_mult=1.0, norm_decay_mult=0.0, bias_decay_mult=0.0)))
