# Makes the OREPA conv layer and backbones known to any OpenMMLab config.
custom_imports = dict(imports=['orepa_mm'], allow_failed_imports=False)
