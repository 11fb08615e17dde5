"""What the options of `train` set, and what could not be trained."""

import pytest
from mmengine.config import Config
from toy_run import toy_config

from orepa_mm.engine import build_runner, build_test_runner, training, use_training_options
from orepa_mm.engine.image_size import describe_image_size
from orepa_mm.errors import ConfigError

LOADER = dict(dataset=dict(type='ToyData'))


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('as_option', [True, False])
def test_mixed_precision_needs_a_gpu(tmp_path, monkeypatch, device, as_option):
    """MMEngine asserts it after the data were read."""
    monkeypatch.setattr(training, 'get_device', lambda: device)
    cfg = toy_config(tmp_path)
    if not as_option:
        cfg.merge_from_dict({'optim_wrapper.type': 'AmpOptimWrapper',
                             'optim_wrapper.dtype': 'bfloat16'})
    if device == 'cpu':
        with pytest.raises(ConfigError, match='needs a GPU'):
            use_training_options(cfg, amp=as_option)
    else:
        use_training_options(cfg, amp=as_option)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.get('loss_scale') == ('dynamic' if as_option else None)


def test_options(tmp_path):
    cfg = toy_config(tmp_path, auto_scale_lr=dict(enable=False, base_batch_size=8))
    use_training_options(cfg)
    assert not cfg.resume
    assert not cfg.auto_scale_lr.enable
    use_training_options(cfg, auto_scale_lr=True, resume='x.pth')
    assert (cfg.auto_scale_lr.enable, cfg.resume, cfg.load_from) == (True, True, 'x.pth')
    use_training_options(cfg, resume='auto')
    assert (cfg.resume, cfg.load_from) == (True, None)
    cfg.pop('auto_scale_lr')
    with pytest.raises(ConfigError, match='base_batch_size'):
        use_training_options(cfg, auto_scale_lr=True)


def test_what_a_run_lacks_is_named_before_it_begins(tmp_path):
    cfg = toy_config(tmp_path / 'run', scores=[1])
    for key in ('train_dataloader', 'optim_wrapper'):
        broken = Config(dict(cfg.to_dict(), **{key: None}))
        with pytest.raises(ConfigError, match=f'has no {key}, which train needs: set it$'):
            use_training_options(broken)
    broken = Config(dict(cfg.to_dict(), val_evaluator=None))
    with pytest.raises(ConfigError, match=r'no val_evaluator, .*or set val_dataloader, val_cfg'):
        build_runner(broken)
    with pytest.raises(ConfigError, match='no test_dataloader and no test_cfg and no test_eval'):
        build_test_runner(cfg, 'no.pth')
    assert not list(tmp_path.iterdir())


def test_a_work_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(NotADirectoryError, match='choose another path'):
        build_runner(toy_config(tmp_path / 'file' / 'run'))


# --- what is said of a run --------------------------------------------------------


def test_the_console_is_short_and_the_file_is_whole(tmp_path, capsys):
    """Of a stock runner the same is all on the console."""
    cfg = toy_config(tmp_path, experiment_name='short')
    cfg.runner_type = 'Runner'
    build_runner(cfg).train()
    said = capsys.readouterr().out
    log = next(tmp_path.rglob('*.log'))
    for text in ('System environment:', 'Config:\n', "type='ToyModel'", 'Hooks will be executed'):
        assert text in log.read_text()
        assert text not in said
    before, _, after = said.partition('Checkpoints will be saved to')
    assert len(before.splitlines()) < 8
    assert str(log) in before
    assert 'Saving checkpoint at 6 iterations' in after


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path):
    """Else each line of it would be a traceback on the console, and the run went on."""
    runner = build_runner(toy_config(tmp_path, experiment_name='full'))
    handler, = (found for found in runner.logger.handlers if hasattr(found, 'baseFilename'))
    handler.stream.close()
    handler.stream = open('/dev/full', 'w')  # noqa: SIM115  the handler closes it
    with pytest.raises(OSError, match='No space left') as error:
        runner.train()
    assert error.value.filename == handler.baseFilename
    handler.stream = None  # it would fail once more at the end
    runner.logger.removeHandler(handler)  # other tests may meet this logger


def test_how_images_are_resized():
    resize, crop = dict(type='Resize', scale=(8, 6)), dict(type='RandomCrop', crop_size=(4, 4))
    cfg = Config(dict(
        model=dict(data_preprocessor=dict(size=(4, 4))),
        train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dict(
            pipeline=[dict(type='LoadImageFromFile'), resize, crop]))),
        val_dataloader=dict(dataset=dict(datasets=[dict(pipeline=[resize])])),
        test_dataloader=dict(dataset=dict(datasets=[dict(pipeline=[resize])]))))
    line = describe_image_size(cfg)
    assert line.startswith('image size: train Resize scale=(8, 6), RandomCrop crop_size=(4, 4); '
                           'val, test Resize scale=(8, 6). Another: --cfg-options ')
    options = {word.partition('=')[0]: (3, 2) for word in line.split('options ')[1].split()}
    cfg.merge_from_dict(options)
    assert describe_image_size(cfg).startswith(
        'image size: train Resize scale=(3, 2), RandomCrop crop_size=(3, 2); val, test Resize '
        'scale=(3, 2).')
    assert cfg.model.data_preprocessor.size == (3, 2)
    for nothing in (dict(model=dict()), dict(model=dict(), val_dataloader=None)):
        assert describe_image_size(Config(nothing)) == ''
