"""What the wheel holds, and that mim finds it."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

from orepa_mm import __version__


@pytest.fixture(scope='module')
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'  # a build writes into its source folder
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        '.git', '.venv', 'work_dirs', 'build', '*.egg-info', '.mim', '__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps',
                    '--no-build-isolation', '-w', folder, source], check=True)
    wheel, = folder.glob('*.whl')
    assert wheel.name.startswith(f'orepa_mm-{__version__}-')
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_everything_tracked(names):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / 'orepa_mm').rglob('*.py')
                if '.mim' not in path.parts}
    for folder in ('configs', 'tools'):
        expected |= {f'orepa_mm/.mim/{path.relative_to(ROOT)}'
                     for path in (ROOT / folder).rglob('*') if path.suffix in ('.py', '.yml')}
    expected.add('orepa_mm/.mim/model-index.yml')
    assert expected == {name for name in names if not name.startswith('orepa_mm-')}


def test_mim_searches_the_configs():
    mim = shutil.which('mim') or str(ROOT / '.venv' / 'bin' / 'mim')
    result = subprocess.run([mim, 'search', 'orepa_mm', '--model',
                             'orepa faster r-cnn'],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'faster-rcnn_orepa-r50_fpn_1x_coco' in result.stdout
