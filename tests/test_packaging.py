"""What the wheel holds, and that mim finds it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import GOLDEN_DATA, ROOT

from orepa_mm import __version__


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy: a build writes into its source folder."""
    source = tmp_path_factory.mktemp('build') / 'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        '.git', '.venv*', 'work_dirs', 'build', '*.egg-info', '.mim', '__pycache__'))
    return source


@pytest.fixture(scope='module')
def names(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
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
                     for path in (ROOT / folder).rglob('*')
                     if path.suffix in ('.py', '.yml', '.sh')}
    expected.add('orepa_mm/.mim/model-index.yml')
    assert expected == {name for name in names if not name.startswith('orepa_mm-')}


def test_source_distribution_holds_the_golden_numbers(source, tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '--dist-dir', tmp_path], cwd=source,
                   check=True, capture_output=True)
    archive, = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as content:
        found = {Path(*Path(name).parts[1:]) for name in content.getnames()}
    expected = {path.relative_to(ROOT) for path in GOLDEN_DATA.iterdir()}
    assert expected <= found


def test_mim_searches_the_configs():
    mim = Path(sys.executable).with_name('mim')
    result = subprocess.run([mim, 'search', 'orepa_mm', '--model',
                             'orepa faster r-cnn'],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'faster-rcnn_orepa-r50_fpn_1x_coco' in result.stdout
