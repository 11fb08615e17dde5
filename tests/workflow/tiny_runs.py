"""What tests of whole jobs share: the config of a tiny run, and a random model of use."""

import argparse

import torch

from orepa_mm.engine import add_config_arguments, load_config


def config(folder):
    """Of a folder with `config.py` and `data/`, as a tool loads it."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return load_config(parser.parse_args([
        str(folder / 'config.py'), '--data-root', str(folder / 'data'), '--work-dir',
        str(folder / 'work')]))


@torch.no_grad()
def let_outputs_be_moderate(model):
    """BN statistics of noise: else all scores are 0 or 1."""
    model.eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.train()
        norm.momentum = None
    features = model.extract_feat(torch.randn(4, 3, 128, 128))
    if hasattr(model, 'decode_head'):
        model.decode_head(features)
    model.eval()
