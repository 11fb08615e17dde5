"""What a report says to do next: command lines that the shell reads as they are meant."""

import html
import json
import re
import shlex

import pytest
from helpers import exit_code

from orepa_mm.errors import ConfigError, DamagedFileError
from orepa_mm.workflow.page import html_commands
from orepa_mm.workflow.report import next_steps, write_report

OWN = 'faster-rcnn_orepa-r18-light_fpn_400i_coco.py'


def test_commands_survive_the_shell_and_the_page(tmp_path):
    deployed = tmp_path / "it's <here> & there"
    steps = next_steps(tmp_path / OWN, deployed, {'package': 'mmdet'})
    page = html_commands(steps)
    lines = [shlex.split(html.unescape(line)) for block in re.findall(
        '<pre>(.*?)</pre>', page, re.DOTALL) for line in block.split('\n')]
    assert lines == [line for _, some in steps for line in some]
    assert [line[3] if line[1] == 'run' else line[1] for line in lines] == [
        'check_data', 'train', 'train', 'expand', 'train', 'compare', 'predict', 'test']
    assert [line[2] for line in lines[:-1]] == ['orepa_mm'] * 7
    assert lines[-1][2:] == ['mmdet', str(deployed / 'config.py'), '--checkpoint',
                             str(deployed / 'model.pth')]
    assert all(OWN in line for line in lines[:6])  # by its name, as mim finds it


def test_a_config_of_the_users_own_is_named_by_its_path(tmp_path):
    config = tmp_path / 'my config.py'
    steps = next_steps(config, tmp_path, {})
    assert str(config) in steps[0][1][0]
    assert shlex.quote(str(config)) in html.unescape(html_commands(steps))


#: As much of a `report.json` as the page shows.
RESULTS = {'machine': {'device': 'cpu', 'processor': 'x', 'threads': 1, 'torch': '2'},
           'input_shape': [1, 3, 64, 64], 'largest_difference': {'float32': 1e-7},
           'verification': {'layers': {'compared': 2, 'failed': []}}}
CONFIG = '''
model = dict(type='X')
val_dataloader = dict(dataset=dict(ann_file='a.json', data_prefix=dict(img='images/')))
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run and what was deployed of it, up to the checkpoints: (run, deployed), both folders."""
    monkeypatch.chdir(tmp_path)
    run, deployed = tmp_path / 'a run', tmp_path / 'deployed'
    for folder in (run, deployed):
        folder.mkdir()
    (run / 'last_checkpoint').write_text(str(run / 'iter_1.pth'))
    (run / 'config.py').write_text(CONFIG)
    (run / 'now' / 'vis_data').mkdir(parents=True)
    (run / 'now' / 'vis_data' / 'scalars.json').write_text('{"loss": 1.0, "step": 1}\n')
    (deployed / 'report.json').write_text(json.dumps(RESULTS))
    (deployed / 'config.py').write_text('')
    (tmp_path / 'a.json').write_text('{"images": []}')
    return run, deployed


def refused(run, error, match):
    with pytest.raises(error, match=match):
        write_report(*run, 'page.html')


def test_what_is_whole_is_read_up_to_the_checkpoints(run):
    refused(run, FileNotFoundError, r'no checkpoint .*iter_1\.pth')
    (run[0] / 'iter_1.pth').touch()
    refused(run, ConfigError, r'deployed/config\.py names no model')


@pytest.mark.parametrize('content', [
    *(json.dumps(RESULTS)[:length] for length in (0, 1, 50, 200)), '[]', '3', 'null', '{}',
    '{"machine": 3}', '{"machine": {}}', '\udcff', json.dumps({**RESULTS, 'verification': None}),
    json.dumps({**RESULTS, 'largest_difference': {'float16': 1}}),
    json.dumps({**RESULTS, 'metrics': {'training': {'AP': 'high'}, 'deployed': {'AP': 1}}})])
def test_a_torn_report_is_named(run, content):
    (run[1] / 'report.json').write_bytes(content.encode(errors='surrogateescape'))
    refused(run, DamagedFileError, r'deployed/report\.json is damaged or of another kind')


@pytest.mark.parametrize(('file', 'content', 'error', 'named'), [
    ('a.json', '{"images": [{"file_', DamagedFileError, r'^a\.json is damaged'),
    ('a.json', '[{"id": 1}]', DamagedFileError, r'^a\.json is damaged'),
    ('a.json', '{"images": [{"id": 1}]}', DamagedFileError, r'^a\.json is damaged'),
    ('a run/config.py', 'x = (', ConfigError, r'a run/config\.py cannot be read'),
    ('a run/config.py', 'x = 1', ConfigError, r'a run/config\.py validates on no data set'),
    ('a run/config.py', 'val_dataloader = None', ConfigError, 'give the run of a detector'),
    ('a run/now/vis_data/scalars.json', '{"loss"\n{}', DamagedFileError, r'log of \S*a run'),
    ('a run/now/vis_data/scalars.json', '[1]', DamagedFileError, r'log of \S*a run'),
])
def test_other_files_that_are_torn_are_named(run, tmp_path, file, content, error, named):
    (tmp_path / file).write_text(content)
    refused(run, error, named)


def test_the_tool_says_it_in_one_line_and_writes_nothing(run, tmp_path, capsys):
    (run[1] / 'report.json').write_text('{"form": "pl')
    before = sorted(tmp_path.rglob('*'))
    assert exit_code('tools/report.py', *run, '--out', tmp_path / 'page.html') == 1
    said = capsys.readouterr().err
    assert said.startswith(f'error: {run[1]}/report.json is damaged')
    assert said.count('\n') == 1
    (run[0] / 'last_checkpoint').unlink()
    before.remove(run[0] / 'last_checkpoint')
    assert exit_code('tools/report.py', *run, '--out', tmp_path / 'page.html') == 1
    assert 'holds no finished training run' in capsys.readouterr().err
    assert sorted(tmp_path.rglob('*')) == before
