"""Running OpenMMLab configs: arguments, config, runner."""

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

__all__ = ['add_config_arguments', 'bare_model', 'build_runner', 'build_test_runner',
           'check_pretrained', 'dump_predictions', 'find_config', 'load_config', 'show_predictions']
