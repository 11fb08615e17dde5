"""Running OpenMMLab configs: arguments, config, runner, optimizer."""

from .branch_similarity import BranchSimilarityHook
from .checkpoint_hook import WholeCheckpointHook
from .exact_resume import ExactResumeHook
from .kernel_step import KernelStepHook
from .launch import (
    add_config_arguments,
    bare_model,
    build_runner,
    build_test_runner,
    check_pretrained,
    dump_predictions,
    find_config,
    load_config,
    on_main_process,
    show_predictions,
    with_tta,
)
from .optimizer import OREPAOptimWrapperConstructor
from .reparam_test_hook import ReparamTestHook, without_reparam_test

__all__ = ['BranchSimilarityHook', 'ExactResumeHook', 'KernelStepHook', 'OREPAOptimWrapperConstructor',
           'ReparamTestHook', 'WholeCheckpointHook', 'add_config_arguments', 'bare_model',
           'build_runner', 'build_test_runner', 'check_pretrained', 'dump_predictions',
           'find_config', 'load_config', 'on_main_process', 'show_predictions', 'with_tta',
           'without_reparam_test']
