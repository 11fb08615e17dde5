"""Reading configs: what is wrong with one is said by its name."""

import argparse
import copy
import re

import pytest
from helpers import ROOT
from mmengine.config import Config

from orepa_mm.engine import add_config_arguments, load_config, read_config
from orepa_mm.engine.config_keys import _TOP, require_known_keys
from orepa_mm.errors import ConfigError

CONFIGS = {name: ROOT / 'configs' / name for name in (
    'faster_rcnn/faster-rcnn_orepa-r18-light_fpn_400i_coco.py',
    'upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py',
    'imagenet/orepa-resnet18-light_300i_in1k.py')}
LIGHT = next(iter(CONFIGS.values()))


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def light():
    return read_config(LIGHT)


# --- files --------------------------------------------------------------------------


@pytest.mark.parametrize(('text', 'words'), [
    ('model = dict(\n  a=1\nb = 2\n', r"a b\.py cannot be read, line \d: .*"),
    ('a = 1\nb = a + c\n', r"a b\.py cannot be read, line 2: NameError: name 'c'"),
    ("_base_ = 'broken.py'\n", r'/broken\.py cannot be read, line 1: '),
    ("_base_ = 'sub/../no.py'\n", r'a b\.py cannot be read: its _base_ \S*/no\.py is not there'),
    ("_base_ = 'mmdet::no/no.py'\n", r'a b\.py cannot be read.*no\.py'),
    ("_base_ = ['one.py', 'one.py']\n", r'Duplicate key'),
    ('from mmengine.config import read_base\nwith read_base():\n    from .no import *\n',
     r'a b\.py cannot be read.*no'),
    ('with read_base(:\n', r'a b\.py cannot be read, line 1: '),
    ('work_dir = "x"\n', r'a b\.py has no model: '),
    ('model = None\n', r'a b\.py has no model: '),
    ('', r'a b\.py has no model: '),
])
def test_what_is_wrong_is_said_with_its_file(tmp_path, text, words):
    (tmp_path / 'a b.py').write_text(text)
    (tmp_path / 'broken.py').write_text('model = dict(]\n')
    (tmp_path / 'one.py').write_text('model = dict(type="X")\n')
    with pytest.raises(ConfigError, match=words) as error:
        load_config(parse(tmp_path / 'a b.py'))
    assert '<unknown>' not in str(error.value)
    assert '\n' not in str(error.value)


def test_files_that_are_no_configs(tmp_path):
    (tmp_path / 'x.pth').write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r'x\.pth cannot be read'):
        read_config(tmp_path / 'x.pth')
    with pytest.raises(FileNotFoundError, match='is a folder'):
        read_config(tmp_path)
    for name in ('no.py', ''):
        with pytest.raises(FileNotFoundError, match='no config file'):
            read_config(name)
    (tmp_path / 'x.py').write_text('custom_imports = dict(imports=["no_such_module"])')
    with pytest.raises(ImportError, match='no_such_module'):
        read_config(tmp_path / 'x.py')


# --- options ------------------------------------------------------------------------


def test_paths_keep_their_spaces():
    options = parse(LIGHT, '--cfg-options', 'load_from=my runs/a b.pth', 'model.x=[(1, 2), c]',
                    'model.y= 3').cfg_options
    assert options == {'load_from': 'my runs/a b.pth', 'model.x': [(1, 2), 'c'], 'model.y': 3}


@pytest.mark.parametrize('option', ['model', '=1', 'model.x'])
def test_words_that_are_no_options(capsys, option):
    with pytest.raises(SystemExit):
        parse(LIGHT, '--cfg-options', option)
    assert f'takes KEY=VALUE, got {option!r}' in capsys.readouterr().err


@pytest.mark.parametrize(('option', 'words'), [
    ('modle.x=1', r'modle\.x: the config has no modle.* Is model meant\?$'),
    ('train_dataloder.batch_size=1', 'Is train_dataloader meant'),
    ('load_form=x.pth', 'Is load_from meant'),
    ('qqqqqqqq=1', 'If your own code reads it'),
    ('train_dataloader.batchsize=4', r'Is train_dataloader\.batch_size meant'),
    ('train_cfg.max_iter=4', r'Is train_cfg\.max_iters meant'),
    ('randomness.sead=4', r'Is randomness\.seed meant'),
    ('env_cfg.cudnn_benchmrk=True', r'Is env_cfg\.cudnn_benchmark meant'),
    ('auto_scale_lr.enabled=True', r'Is auto_scale_lr\.enable meant'),
    ('default_hooks.chekpoint.interval=1', r'Is default_hooks\.checkpoint meant'),
    ('env_cfg.zzzz=1', r'There are \S*, '),
])
def test_mistyped_settings_are_refused(light, option, words):
    with pytest.raises(ConfigError, match=words):
        require_known_keys(light, parse(LIGHT, '--cfg-options', option).cfg_options)


RTMDET = 'rtmdet/rtmdet_orepa-tiny_8xb32-300e_coco.py'
UPERNET = 'upernet/upernet_orepa-r18_4xb2-40k_cityscapes-512x1024.py'


@pytest.mark.parametrize(('config', 'option', 'read'), [
    (RTMDET, 'max_epochs=2', ['train_cfg.max_epochs']),
    (RTMDET, 'base_lr=0.1', ['optim_wrapper.optimizer.lr']),
    (RTMDET, 'train_pipeline.1.with_bbox=False', ['train_dataloader.dataset.pipeline.1.with_bbox']),
    (RTMDET, 'dataset_type=X', ['test_dataloader.dataset.type', 'train_dataloader.dataset.type']),
    (RTMDET, 'stage2_num_epochs=2', []),  # what was made from it has another value
    (UPERNET, 'crop_size=(64,64)', ['model.data_preprocessor.size', 'pipeline.3.crop_size']),
    (UPERNET, 'norm_cfg.type=BN', ['model.backbone.norm_cfg.type',
                                   'model.decode_head.norm_cfg.type']),
    (UPERNET, 'data_preprocessor.size=(64,64)', ['model.data_preprocessor.size']),
    (LIGHT, 'data_root=/nowhere/', ['--data-root', 'train_dataloader.dataset.data_root']),
    (LIGHT, 'backend_args.backend=local', ['backend_args.backend']),
    (LIGHT, 'data_preprocessor.bgr_to_rgb=False', ['model.data_preprocessor.bgr_to_rgb']),
])
def test_a_variable_that_was_read_already_names_what_is_read(config, option, read):
    """Accepted, it would change nothing; what is named does."""
    cfg = read_config(ROOT / 'configs' / config)
    options = parse(LIGHT, '--cfg-options', option).cfg_options
    key, = options
    with pytest.raises(ConfigError, match=f'{key}: nothing reads {key.split(".")[0]} of') as error:
        require_known_keys(cfg, options)
    said = re.search(r'Set (.*?)\. If your', str(error.value))[1]
    assert all(name in said for name in read)
    named = re.findall(r'\w+(?:\.\w+)+', said)
    assert bool(named) == bool(read)
    require_known_keys(cfg, dict.fromkeys(named))
    cfg.runner_type = 'MyRunner'  # which may read anything
    require_known_keys(cfg, options)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=lambda path: path.stem)
def test_no_variable_of_a_config_is_taken_in_silence(config):
    """Whatever the file calls it: an option either changes what is built, or is refused."""
    cfg = read_config(config)
    built = {key: cfg.get(key) for key in _TOP}
    for name in cfg:
        changed = copy.deepcopy(cfg)
        changed.merge_from_dict({name: 'other'})
        if {key: changed.get(key) for key in _TOP} == built:
            with pytest.raises(ConfigError, match='nothing reads'):
                require_known_keys(cfg, {name: 'other'})
        elif name != 'data_preprocessor':
            require_known_keys(cfg, {name: 'other'})


@pytest.mark.parametrize(('option', 'words'), [
    ('modle.x=1', 'Is model meant'),
    ('train_dataloader.dataset.pipeline.99.scale=1', 'do not fit the config: Index 99'),
])
def test_options_are_refused_when_a_config_is_loaded(option, words):
    with pytest.raises(ConfigError, match=words):
        load_config(parse(LIGHT, '--cfg-options', option), check=False)


@pytest.mark.parametrize('config', CONFIGS)
def test_settings_that_may_be_new(config):
    """A backbone's argument, test settings, hooks, wrappers: whatever is passed on."""
    options = [
        'model.backbone.frozen_stages=1', 'model.backbone.init_cfg=None', 'model.test_cfg.x.y=1',
        'model.train_cfg.new=1', 'model.new_head.type=X',
        'train_dataloader.batch_size=1', 'train_dataloader.num_batch_per_epoch=1',
        'train_dataloader.pin_memory=False', 'train_dataloader.dataset.new=1',
        'val_dataloader.sampler.new=1', 'val_dataloader.drop_last=False',
        'custom_hooks=[]', 'custom_imports.imports=[orepa_mm]', 'load_from=x.pth', 'resume=True',
        'visualizer.vis_backends=[]', 'visualizer.vis_backends.0.type=TensorboardVisBackend',
        'visualizer.save_dir=x', 'default_hooks.early_stopping.type=EarlyStoppingHook',
        'default_hooks.early_stopping.monitor=x', 'default_hooks.checkpoint.save_best=auto',
        'default_hooks.timer=None', 'env_cfg.cudnn_benchmark=True', 'env_cfg.dist_cfg.new=1',
        'optim_wrapper.accumulative_counts=2', 'optim_wrapper.dtype=bfloat16',
        'optim_wrapper._delete_=True', 'optim_wrapper.type=OptimWrapper', 'param_scheduler=None',
        'randomness.deterministic=True', 'randomness.diff_rank_seed=True', 'work_dir=x',
        'launcher=none', 'log_level=INFO', 'log_processor.window_size=5', 'compile=True',
        'find_unused_parameters=True', 'sync_bn=torch', 'model_wrapper_cfg.type=X',
        'experiment_name=x', 'auto_scale_lr.enable=True', 'auto_scale_lr.base_batch_size=4',
        'tta_model.type=X', 'val_evaluator.new=1', 'test_cfg.fp16=True', 'val_cfg=None',
        'train_cfg.val_begin=5', 'train_cfg.dynamic_intervals=[(1,2)]', 'train_cfg._delete_=True']
    cfg = read_config(CONFIGS[config])
    require_known_keys(cfg, parse(LIGHT, '--cfg-options', *options).cfg_options)


def test_what_is_not_ours_to_know():
    """Loops and runners of somebody else, and lists in place of one loader."""
    cfg = Config(dict(train_cfg=dict(type='MyLoop'), val_dataloader=[dict()], train_dataloader=None,
                      default_hooks=None, mine=dict()))
    require_known_keys(cfg, {'train_cfg.mine': 1, 'val_dataloader.0.mine': 1,
                             'default_hooks.x.type': 'X', 'default_hooks.x.y': 1})
    with pytest.raises(ConfigError, match='batchsize'):
        require_known_keys(cfg, {'train_dataloader.batchsize': 1, 'mine.x': 1})
    cfg.runner_type = 'MyRunner'
    require_known_keys(cfg, {'train_dataloader.batchsize': 1, 'mine.x': 1})
