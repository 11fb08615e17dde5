"""What the doctor says of broken installations."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from orepa_mm import doctor


def problems(monkeypatch, versions=None, imports=None):
    """The findings with a remedy, where some versions and import errors are given."""
    real_version, real_import = doctor.version_of, doctor.import_problem
    monkeypatch.setattr(doctor, 'version_of',
                        lambda name: (versions or {}).get(name, real_version(name)))
    monkeypatch.setattr(doctor, 'import_problem',
                        lambda name: (imports or {}).get(name, real_import(name)))
    return {f.name: f'{f.detail} -> {f.remedy}' for f in doctor.diagnose() if f.remedy}


def test_this_environment_is_healthy(monkeypatch, capsys):
    """What is no problem may be a note: a driver whose GPU this process does not see."""
    assert problems(monkeypatch).keys() <= {'GPU'}
    assert doctor.main() == 0
    assert 'Ready to train.' in capsys.readouterr().out


@pytest.mark.parametrize(('versions', 'imports', 'name', 'text'), [
    ({'setuptools': '82.0.0'}, {}, 'setuptools', 'which 82 dropped'),
    ({'onedl-mmcv': '2.3.6', 'mmengine': '0.10.7'}, {}, 'OpenMMLab', 'uninstall one'),
    ({}, {'mmcv.ops': "ModuleNotFoundError: No module named 'mmcv._ext'"}, 'mmcv operators',
     'without its operators'),
    ({}, {'mmcv.ops': 'ImportError: _ext.so: undefined symbol: _ZN3c10'}, 'mmcv operators',
     'built for another torch'),
    ({'mmcv': '2.1.0', 'mmcv-lite': '2.1.0'}, {}, 'mmcv', 'uninstall both'),
    ({'mmcv': None, 'mmcv-lite': '2.1.0'}, {'mmcv._ext': 'ModuleNotFoundError'}, 'mmcv',
     'mmcv-lite has no operators'),
    ({}, {'cv2': 'ImportError: libxcb.so.1: cannot open shared object file: No such file or '
          'directory', 'mmcv': 'ImportError: libxcb.so.1', 'mmcv.ops': 'ImportError: libxcb.so.1'},
     'OpenCV', 'the system has no libxcb.so.1 -> put opencv-python-headless in the place'),
    ({}, {'cv2': 'ImportError: libGL.so.1: cannot open shared object file'}, 'OpenCV', 'libgl1'),
    ({}, {'cv2': 'AttributeError: partially initialized module'}, 'OpenCV', 'headless'),
    ({}, {'torchvision': 'RuntimeError: operator torchvision::nms does not exist'},
     'torchvision', 'another torch'),
    ({}, {'mmdet.models': 'AssertionError: MMCV==2.2.0 is used'}, 'mmdet', 'cannot be built'),
    ({}, {'orepa_mm.checkpoints': "ModuleNotFoundError: No module named 'numpy._core'"},
     'orepa_mm', 'numpy._core'),
    ({}, {f'orepa_mm.backbones.{name}': 'ImportError' for name in ('det', 'seg', 'cls')},
     'orepa_mm', 'none of mmdet, mmseg and mmpretrain'),
])
def test_each_trap_is_recognised(monkeypatch, capsys, versions, imports, name, text):
    found = problems(monkeypatch, versions, imports)
    assert text in found[name]
    assert doctor.main() == 1
    assert 'PROBLEM' in capsys.readouterr().out


@pytest.mark.parametrize(('driver', 'reached', 'cuda', 'says', 'code'), [
    (True, False, None, 'this torch is built for processors alone -> run `make setup', 1),
    (True, False, '13.0', 'torch does not reach a GPU', 0),
    (False, False, None, None, 0),
    (True, True, '13.0', None, 0)])
def test_a_gpu_that_torch_does_not_reach(monkeypatch, driver, reached, cuda, says, code):
    """The build for processors alone is what a set-up on a login node leaves."""
    monkeypatch.setattr(doctor, 'has_nvidia_driver', lambda: driver)
    monkeypatch.setattr('torch.cuda.is_available', lambda: reached)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: 'H100')
    monkeypatch.setattr('torch.version.cuda', cuda)
    monkeypatch.setattr('mmcv.ops.get_compiling_cuda_version', lambda: '13.0')
    found = problems(monkeypatch).get('GPU')
    assert found is None if says is None else says in found
    assert doctor.main() == code


def test_operators_for_processors_alone_do_not_pass_on_a_gpu(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: 'H100')
    monkeypatch.setattr(doctor, '_torchvision_operators', lambda: None)
    monkeypatch.setattr('mmcv.ops.get_compiling_cuda_version', lambda: 'not available')
    assert 'but there is a GPU' in problems(monkeypatch, {'mmcv-lite': None})['mmcv operators']


def test_the_operators_of_torchvision_will_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', SimpleNamespace(OPERATORS=('nms', 'roi_align')))
    assert problems(monkeypatch, {'mmcv': None, 'mmcv-lite': '2.1.0'}) == {}
    assert doctor.main() == 0
    assert 'of torchvision: nms, roi_align;' in capsys.readouterr().out


@pytest.mark.parametrize(('distribution', 'fork', 'module'), [
    ('mmdet', 'onedl-mmdetection', 'mmdet'), ('mmpretrain', 'onedl-mmpretrain', 'mmpretrain'),
    ('mmsegmentation', 'onedl-mmsegmentation', 'mmseg')])
def test_one_package_is_enough(monkeypatch, distribution, fork, module):
    found = problems(monkeypatch, {distribution: None, fork: None})
    assert f'pip install {fork if doctor._with_forks() else distribution}' in found[module]
    assert doctor.main() == 0


def test_the_forks_are_named_with_what_installs_them(monkeypatch, capsys):
    versions = dict.fromkeys(doctor._OFFICIAL) | dict.fromkeys(doctor._FORKS, '9.8')
    found = problems(monkeypatch, versions | {'onedl-mmpretrain': None, 'setuptools': '82.0'}, {
        'mmdet.models': 'ImportError', 'mmengine': 'ImportError',
        'mmcv.ops': "ModuleNotFoundError: No module named 'mmcv._ext'"})
    assert 'pip install onedl-mmpretrain==' in found['mmpretrain']
    assert 'pip install onedl-mmengine==' in found['mmengine']
    assert '--no-build-isolation --no-cache-dir onedl-mmcv==' in found['mmcv operators']
    assert 'constraints-onedl.txt' in found['mmdet']
    assert 'setuptools==81.0.0' in found['setuptools']
    for name in ('mmpretrain', 'mmengine', 'mmcv operators', 'mmdet'):
        assert 'make setup STACK=onedl' in found[name]
    doctor.main()
    assert '9.8 (onedl-mmsegmentation)' in capsys.readouterr().out


def test_an_install_that_mim_does_not_follow(monkeypatch, tmp_path):
    pytest.importorskip('mim.utils')
    monkeypatch.setattr('mim.utils.get_installed_path', lambda _: str(tmp_path / 'elsewhere'))
    assert 'elsewhere, where no configs are -> ' in problems(monkeypatch)['mim']
    monkeypatch.setattr('mim.utils.get_installed_path', lambda _: {}['orepa_mm'])
    assert 'does not find orepa_mm (KeyError)' in problems(monkeypatch)['mim']
    assert doctor.main() == 0


def test_mim_may_be_missing(monkeypatch):
    assert 'pip install o' in problems(monkeypatch, {'openmim': None, 'onedl-mim': None})['mim']
    assert doctor.main() == 0


def test_what_is_optional_is_named(monkeypatch):
    assert 'pip install onnx onnxscript' in problems(monkeypatch, {'onnxruntime': None})['ONNX']
    assert doctor.main() == 0


def test_it_starts_where_nothing_is_installed():
    """-S leaves site-packages out: this is a bare Python."""
    result = subprocess.run([sys.executable, '-S', '-m', 'orepa_mm.doctor'], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 1
    assert 'PROBLEM  torch' in result.stdout
    assert 'make setup' in result.stdout
    assert 'Traceback' not in result.stderr
