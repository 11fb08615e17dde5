"""Running OpenMMLab configs: arguments, config, runner, optimizer."""

from .launch import (
    add_config_arguments,
    bare_model,
    build_runner,
    build_test_runner,
    check_pretrained,
    dump_predictions,
    find_config,
    load_config,
    show_predictions,
)
from .optimizer import OREPAOptimWrapperConstructor

__all__ = ['OREPAOptimWrapperConstructor', 'add_config_arguments', 'bare_model', 'build_runner',
           'build_test_runner', 'check_pretrained', 'dump_predictions', 'find_config',
           'load_config', 'show_predictions']
