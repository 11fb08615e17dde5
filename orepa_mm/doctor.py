"""Say what is installed, what is missing or broken, and what to do about it.

Run as `python -m orepa_mm.doctor` or `make doctor`. Needs nothing but Python.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_OFFICIAL = {'mmengine': 'mmengine', 'mmcv': 'mmcv', 'mmdet': 'mmdet',
             'mmsegmentation': 'mmseg', 'mmpretrain': 'mmpretrain'}
_FORKS = {'onedl-mmengine': 'mmengine', 'onedl-mmcv': 'mmcv', 'onedl-mmdetection': 'mmdet',
          'onedl-mmsegmentation': 'mmseg', 'onedl-mmpretrain': 'mmpretrain'}
#: How to install each module, official or fork.
_INSTALL = {
    'mmengine': ('pip install mmengine==0.10.7', 'pip install onedl-mmengine==0.10.12'),
    'mmcv': ('MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir mmcv==2.1.0',
             'pip install --no-build-isolation --no-cache-dir onedl-mmcv==2.3.6'),
    'mmdet': ('pip install mmdet==3.3.0', 'pip install onedl-mmdetection==3.5.1'),
    'mmseg': ('pip install mmsegmentation==1.2.2 ftfy regex',
              'pip install onedl-mmsegmentation==1.4.2'),
    'mmpretrain': ('pip install mmpretrain==1.2.0', 'pip install onedl-mmpretrain==1.3.6')}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        detail: Its version, or what is wrong.
        remedy: What to do; empty if all is well.
        required: Whether it must be put right before anything is trained.
    """

    name: str
    detail: str
    remedy: str = ''
    required: bool = True

    @property
    def mark(self) -> str:
        """What stands before the line."""
        return 'ok' if not self.remedy else 'PROBLEM' if self.required else 'note'


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def import_problem(module: str) -> str:
    """Why a module does not import, empty if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        return f'{type(error).__name__}: {error}'
    return ''


def diagnose() -> Iterator[Finding]:
    """Look at everything that OREPA models in OpenMMLab need, in the order of dependence."""
    yield _python()
    yield from _torch()
    yield from _setuptools()
    yield from _stacks()
    yield _mmcv_operators()
    for module, needed_for in (('mmdet', 'detectors'), ('mmseg', 'segmentors'),
                               ('mmpretrain', 'classifiers')):
        yield _toolbox(module, needed_for)
    yield _optional('ONNX', ('onnx', 'onnxscript', 'onnxruntime'), '--onnx')
    yield _optional('safetensors', ('safetensors',), '--safetensors')
    yield _registered()
    yield _mim()


def _python() -> Finding:
    version = '.'.join(map(str, sys.version_info[:3]))
    good = (3, 10) <= sys.version_info[:2] <= (3, 14)
    return Finding('Python', version, '' if good else
                   'use Python 3.10 to 3.14, for which the pinned torch has wheels', required=False)


def _torch() -> Iterator[Finding]:
    version, problem = version_of('torch'), import_problem('torch')
    if problem:
        yield Finding('torch', version or problem, 'run `make setup`, or install torch 2.12.1 '
                      'and torchvision 0.27.1 together')
        return
    yield Finding('torch', version or 'of unknown version')
    yield from _gpu()
    version, problem = version_of('torchvision'), import_problem('torchvision')
    if 'torchvision::nms' in problem:
        yield Finding('torchvision', f'{version} was built for another torch '
                      f'(this is {version_of("torch")})', 'install a pair made for each other, '
                      'e.g. torch==2.12.1 torchvision==0.27.1 from one index')
    elif problem:
        yield Finding('torchvision', version or problem,
                      'pip install torchvision==0.27.1 (mmpretrain and mmdet need it)')
    else:
        yield Finding('torchvision', version or 'of unknown version')


def _gpu() -> Iterator[Finding]:
    """Whether PyTorch reaches the GPU, where there is a driver for one."""
    import torch
    if torch.cuda.is_available():
        yield Finding('GPU', torch.cuda.get_device_name())
    elif has_nvidia_driver() and torch.version.cuda is None and torch.version.hip is None:
        yield Finding('GPU', 'there is an NVIDIA driver, but this torch is built for processors '
                      'alone', f'run `{_setup()}` on this machine')
    elif has_nvidia_driver():
        yield Finding('GPU', 'there is an NVIDIA driver, but torch does not reach a GPU',
                      'see `nvidia-smi`: is CUDA_VISIBLE_DEVICES empty, or the driver older than '
                      f'CUDA {torch.version.cuda} needs?', required=False)


def has_nvidia_driver() -> bool:
    """Whether this machine has a driver for NVIDIA's GPUs."""
    return bool(shutil.which('nvidia-smi')) or Path('/proc/driver/nvidia/version').exists()


def _setuptools() -> Iterator[Finding]:
    version = version_of('setuptools')
    if version is None or int(version.partition('.')[0]) >= 82:
        fitting = '81.0.0' if _with_forks() else '79.0.1'
        yield Finding('setuptools', version or 'not installed', f'pip install setuptools=={fitting}'
                      ': mim and `mmdet::` configs need pkg_resources, which 82 dropped')
    else:
        yield Finding('setuptools', version)


def _installed(names: Iterable[str]) -> list[str]:
    return [name for name in names if version_of(name)]


def _with_forks() -> bool:
    """Whether the packages at hand are the maintained forks."""
    return bool(_installed(_FORKS)) and not _installed(_OFFICIAL)


def _setup() -> str:
    return 'make setup STACK=onedl' if _with_forks() else 'make setup'


def _reinstall(module: str) -> str:
    """What installs a module."""
    return f'run `{_setup()}`, or `{_INSTALL[module][_with_forks()]}`'


def _rebuild() -> str:
    """What brings mmcv's operators."""
    return f'have it built for the torch at hand: {_reinstall("mmcv")}'


def _stacks() -> Iterator[Finding]:
    official, forks = _installed(_OFFICIAL), _installed(_FORKS)
    if official and forks:
        yield Finding('OpenMMLab', f'both {", ".join(official)} and {", ".join(forks)}',
                      'uninstall one of the two sets: they share their import names and '
                      'overwrite each other')
    yield from _shared_libraries()
    for module in ('mmengine', 'mmcv'):
        version, problem = _version_of_module(module), import_problem(module)
        remedy = _reinstall(module) if problem else ''
        if module == 'mmcv' and version_of('mmcv-lite'):
            version = f'{version_of("mmcv-lite")}, lite'
            if version_of('mmcv'):
                remedy = 'mmcv and mmcv-lite share their files: uninstall both, run `make setup`'
            elif not problem and _torchvision_operators() is None:
                remedy = f'mmcv-lite has no operators: `{_setup()}` adds those of torchvision'
        yield Finding(module, version if version and not problem else problem, remedy)


def _shared_libraries() -> Iterator[Finding]:
    """The library of the system that OpenCV lacks: without it nothing of OpenMMLab imports."""
    problem = import_problem('cv2')
    if missing := re.search(r'(lib[\w.+-]+): cannot open shared object file', problem):
        yield Finding('OpenCV', f'the system has no {missing[1]}', 'put opencv-python-headless in '
                      'the place of opencv-python (pip uninstall opencv-python; pip install '
                      'opencv-python-headless), or install the library (Debian: apt-get install '
                      'libgl1 libxcb1 libglib2.0-0)')
    elif problem and not problem.startswith('ModuleNotFoundError'):
        yield Finding('OpenCV', problem, 'pip install opencv-python-headless')


def _mmcv_operators() -> Finding:
    problem = import_problem('mmcv.ops')
    if not problem and (operators := _torchvision_operators()):
        return Finding('mmcv operators', f'of torchvision: {", ".join(operators)}; all others are '
                       f'missing ({_setup()} MMCV=full compiles them)')
    if not problem and _reaches_gpu() and (
            sys.modules['mmcv.ops'].get_compiling_cuda_version() == 'not available'):
        return Finding('mmcv operators', 'compiled for processors alone, but there is a GPU',
                       _rebuild())
    if not problem:
        return Finding('mmcv operators', 'compiled and loading')
    if 'mmcv._ext' in problem and 'No module' in problem:
        return Finding('mmcv operators', 'mmcv was installed without its operators', _rebuild())
    if 'undefined symbol' in problem or 'libtorch' in problem or 'libc10' in problem:
        problem = f'mmcv was built for another torch ({problem})'
    return Finding('mmcv operators', problem, _rebuild())


def _reaches_gpu() -> bool:
    return not import_problem('torch') and sys.modules['torch'].cuda.is_available()


def _torchvision_operators() -> tuple[str, ...] | None:
    """Names of the operators that requirements/mmcv_ext.py gives; None if it is not there."""
    if import_problem('mmcv._ext'):
        return None
    return getattr(sys.modules['mmcv._ext'], 'OPERATORS', None)


def _version_of_module(module: str) -> str | None:
    """Version of a module of OpenMMLab; of a fork, with its name."""
    for name, target in {**_OFFICIAL, **_FORKS}.items():
        if target == module and (version := version_of(name)):
            return f'{version} ({name})' if name in _FORKS else version
    return None


def _toolbox(module: str, needed_for: str) -> Finding:
    version = _version_of_module(module)
    if version is None:
        return Finding(module, 'not installed', f'{_reinstall(module)} (for {needed_for})',
                       required=False)
    problem = import_problem(f'{module}.models')
    pins = 'constraints-onedl.txt' if _with_forks() else 'constraints.txt'
    return Finding(module, problem or version, problem and f'{needed_for} cannot be built: run '
                   f'`{_setup()}`, or reinstall it with the versions in requirements/{pins}')


def _optional(name: str, distributions: tuple[str, ...], option: str) -> Finding:
    versions = {distribution: version_of(distribution) for distribution in distributions}
    if None in versions.values():
        return Finding(name, 'not installed', f'pip install {" ".join(distributions)} '
                       f'(for tools/reparam.py {option})', required=False)
    return Finding(name, ', '.join(f'{key} {value}' for key, value in versions.items()))


def _registered() -> Finding:
    version = version_of('orepa_mm') or 'source tree'
    problem = next(filter(None, map(import_problem, (
        'orepa_mm.checkpoints', 'orepa_mm.layers', 'orepa_mm.backbones'))), '')
    loaded = [package for package, module in (('mmdet', 'det'), ('mmseg', 'seg'),
                                              ('mmpretrain', 'cls'))
              if not problem and not import_problem(f'orepa_mm.backbones.{module}')]
    if loaded:
        return Finding('orepa_mm', f'{version}, backbones registered for {", ".join(loaded)}')
    return Finding('orepa_mm', problem or f'{version}, but none of mmdet, mmseg and mmpretrain '
                   'loads: there is nothing to register backbones for', 'solve the problems above')


def _mim() -> Finding:
    """mim looks for configs and tools in the folder that it takes for the package's."""
    name = 'onedl-mim' if _with_forks() else 'openmim'
    version = version_of(name)
    if version is None or import_problem('mim.utils'):
        return Finding('mim', 'not installed', f'pip install {name} (for `mim train orepa_mm`; the '
                       'tools run without it)', required=False)
    try:
        folder = Path(sys.modules['mim.utils'].get_installed_path('orepa_mm'))
    except Exception as error:  # whatever it raises of a package that it does not know
        folder, problem = None, f'{version} does not find orepa_mm ({type(error).__name__})'
    else:
        problem = f'{version} looks for orepa_mm in {folder}, where no configs are'
    if folder and (folder / '.mim' / 'configs').is_dir():
        return Finding('mim', f'{version}, finds orepa_mm')
    return Finding('mim', problem, 'mim follows an install by `'
                   f'{_setup()}`; without it run the scripts of tools/ themselves', required=False)


def main() -> int:
    """Print the report; the exit code is 1 if something is broken, or nothing can be trained."""
    findings = list(diagnose())
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f'{finding.mark:8} {finding.name:{width}}  {finding.detail}')
        if finding.remedy:
            print(f'{"":8} {"":{width}}  -> {finding.remedy}')
    failed = any(finding.remedy and finding.required for finding in findings)
    print('Something is missing, see above.' if failed else 'Ready to train.')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
