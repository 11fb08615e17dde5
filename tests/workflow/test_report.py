"""What a report says to do next: command lines that the shell reads as they are meant."""

import html
import re
import shlex

from orepa_mm.workflow.page import html_commands
from orepa_mm.workflow.report import next_steps

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
