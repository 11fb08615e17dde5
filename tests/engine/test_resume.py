"""What a run goes on from, where `last_checkpoint` is of no use."""

import os
import shutil

import pytest
import torch
from mmengine.registry import METRICS
from mmengine.runner import find_latest_checkpoint
from toy_run import ToyMetric, toy_config, train

from orepa_mm.checkpoints import load_checkpoint
from orepa_mm.engine import build_runner
from orepa_mm.engine.resume import checkpoint_folders, newest_checkpoint
from orepa_mm.errors import CheckpointError


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with iter_2, iter_4, iter_6, and best_acc_iter_6, which cannot be resumed."""
    folder = tmp_path_factory.mktemp('trained')
    train(folder, checkpoint=dict(save_best='acc'), scores=[0, 0, 0, 0, 0, 1],
          experiment_name='trained')
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy, the best one written last."""
    folder = shutil.copytree(trained, tmp_path / 'run')
    for age, name in enumerate(['best_acc_iter_6', 'iter_6', 'iter_4', 'iter_2']):
        os.utime(folder / f'{name}.pth', (10**9 - age, 10**9 - age))
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_6.pth'))
    (folder / '.iter_8-abcd_123.pth').write_bytes((folder / 'iter_6.pth').read_bytes())
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def flip(path):
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    weight = load_checkpoint(path)['state_dict']['layer.weight'].numpy().tobytes()
    content[content.index(weight)] ^= 1
    path.write_bytes(content)


def test_a_good_pointer_is_followed_as_the_runner_does(folder):
    assert newest_checkpoint(folder) == (str(folder / 'iter_6.pth'), '')
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_2.pth'))
    assert newest_checkpoint(folder) == (find_latest_checkpoint(str(folder)), '')
    (folder / 'last_checkpoint').write_text('s3://there/iter_2.pth')
    assert newest_checkpoint(folder) == ('s3://there/iter_2.pth', '')


@pytest.mark.parametrize('pointer', [None, '', 'gone.pth', 'iter_6.pth'])
@pytest.mark.parametrize('damage', [cut, flip, os.unlink, lambda path: path.write_bytes(b'')])
def test_the_newest_whole_one_is_taken(folder, pointer, damage):
    damage(folder / 'iter_6.pth')
    file = folder / 'last_checkpoint'
    file.unlink() if pointer is None else file.write_text(pointer and str(folder / pointer))
    path, problem = newest_checkpoint(folder)
    assert path == str(folder / 'iter_4.pth')
    assert str(file) in problem


def test_other_folders_are_looked_into(folder, tmp_path):
    other = tmp_path / 'out' / 'run'
    other.mkdir(parents=True)
    (folder / 'iter_6.pth').rename(other / 'iter_6.pth')
    runner = build_runner(toy_config(folder, checkpoint=dict(out_dir=str(tmp_path / 'out'))))
    assert checkpoint_folders(runner) == [str(other)]
    assert newest_checkpoint(folder, checkpoint_folders(runner))[0] == str(other / 'iter_6.pth')


def test_nothing_there_starts_anew_and_nothing_whole_is_an_error(folder, tmp_path):
    assert newest_checkpoint(tmp_path) == (None, '')
    for name in ('iter_2', 'iter_4', 'iter_6'):
        cut(folder / f'{name}.pth')
    with pytest.raises(CheckpointError, match=r'(?s)nothing to resume from.*iter_6.pth is damaged'
                       r'.*iter_4.pth is damaged.*iter_2.pth is damaged.*start anew'):
        newest_checkpoint(folder)


@pytest.mark.parametrize('name', ['iter_6', None])
def test_a_run_goes_on_from_it_and_says_so(folder, tmp_path, name):
    """Against a run that was never stopped."""
    if name:
        cut(folder / f'{name}.pth')
    runner = train(folder, max_iters=8, resume=True, experiment_name=f'resumed-{name}')
    lines = (folder / 'progress').read_text().split()[1::2]
    assert lines[6:] == (['4', '5', '6', '7'] if name else ['6', '7'])
    log = '\n'.join(path.read_text() for path in folder.rglob('*.log'))
    warning = f'going on from {folder}/iter_4.pth, the newest whole checkpoint'
    assert (warning in log) == bool(name)
    assert f'Load checkpoint from {folder}/iter_{4 if name else 6}.pth' in log
    straight = train(tmp_path / 'straight', max_iters=8, experiment_name=f'straight-{name}')
    assert torch.equal(runner.model.layer.weight, straight.model.layer.weight)


def test_a_checkpoint_that_is_named_is_taken(folder):
    cut(folder / 'last_checkpoint')
    cfg = toy_config(folder, max_iters=4, resume=True, load_from=str(folder / 'iter_2.pth'),
                     experiment_name='named')
    runner = build_runner(cfg)
    runner.train()
    assert runner.iter == 4
    assert (folder / 'progress').read_text().split()[1::2][6:] == ['2', '3']


def test_the_first_start_with_resume(tmp_path):
    assert train(tmp_path, max_iters=2, resume=True, experiment_name='first').iter == 2


def test_killed_before_the_last_validation(tmp_path):
    """The checkpoint of the last iteration is written before that is validated."""
    scores = []

    class Metric(ToyMetric):
        def compute_metrics(self, results):
            scores.append(super().compute_metrics(results))
            return scores[-1]

    METRICS.register_module(module=Metric, name='ToyMetric', force=True)
    try:
        train(tmp_path, scores=range(6), experiment_name='whole')
        assert len(scores) == 6
        train(tmp_path, scores=[9], resume=True, experiment_name='again')
        assert [score['acc'] for score in scores[6:]] == [9]
        train(tmp_path, scores=[10, 11], resume=True, max_iters=8, experiment_name='more')
        assert [score['acc'] for score in scores[7:]] == [10, 11]
    finally:
        METRICS.register_module(module=ToyMetric, name='ToyMetric', force=True)
