"""Running OpenMMLab configs: arguments, config, runner, optimizer."""

from .branch_similarity import BranchSimilarityHook
from .checkpoint_hook import WholeCheckpointHook
from .config import (
    SettingsAction,
    add_config_arguments,
    find_config,
    load_config,
    read_config,
)
from .exact_resume import ExactResumeHook
from .kernel_step import KernelStepHook
from .launch import bare_model, build_runner, build_test_runner, on_main_process, require_loops
from .optimizer import OREPAOptimWrapperConstructor
from .pretrained import check_pretrained
from .reparam_test_hook import ReparamTestHook, without_reparam_test
from .test_options import dump_predictions, show_predictions, with_tta
from .training import use_training_options

__all__ = ['BranchSimilarityHook', 'ExactResumeHook', 'KernelStepHook',
           'OREPAOptimWrapperConstructor', 'ReparamTestHook', 'SettingsAction',
           'WholeCheckpointHook', 'add_config_arguments', 'bare_model', 'build_runner',
           'build_test_runner', 'check_pretrained', 'dump_predictions', 'find_config',
           'load_config', 'on_main_process', 'read_config', 'require_loops', 'show_predictions',
           'use_training_options', 'with_tta', 'without_reparam_test']
