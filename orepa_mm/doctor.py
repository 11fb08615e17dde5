"""Say what is installed, what is missing or broken, and what to do about it.

Run as `python -m orepa_mm.doctor` or `make doctor`. Needs nothing but Python.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

_OFFICIAL = {'mmengine': 'mmengine', 'mmcv': 'mmcv', 'mmdet': 'mmdet',
             'mmsegmentation': 'mmseg', 'mmpretrain': 'mmpretrain'}
_FORKS = {'onedl-mmengine': 'mmengine', 'onedl-mmcv': 'mmcv', 'onedl-mmdetection': 'mmdet',
          'onedl-mmsegmentation': 'mmseg', 'onedl-mmpretrain': 'mmpretrain'}
_MMCV = 'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir mmcv==2.1.0'
_REBUILD = f'build it for the torch at hand: delete .venv and run `make setup`, or `{_MMCV}`'
_INSTALL = {'mmengine': 'pip install mmengine==0.10.7', 'mmcv': _MMCV,
            'mmdet': 'pip install mmdet==3.3.0',
            'mmseg': 'pip install mmsegmentation==1.2.2 ftfy regex',
            'mmpretrain': 'pip install mmpretrain==1.2.0'}


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
    for distribution, module, needed_for in (('mmdet', 'mmdet', 'detectors'),
                                             ('mmsegmentation', 'mmseg', 'segmentors'),
                                             ('mmpretrain', 'mmpretrain', 'classifiers')):
        yield _toolbox(distribution, module, needed_for)
    yield _optional('ONNX', ('onnx', 'onnxscript', 'onnxruntime'), '--onnx')
    yield _optional('safetensors', ('safetensors',), '--safetensors')
    yield _registered()


def _python() -> Finding:
    version = '.'.join(map(str, sys.version_info[:3]))
    good = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Finding('Python', version, '' if good else
                   'use Python 3.10 to 3.12: torch and mmcv are pinned to them', required=False)


def _torch() -> Iterator[Finding]:
    version, problem = version_of('torch'), import_problem('torch')
    if problem:
        yield Finding('torch', version or problem, 'run `make setup`, or install torch 2.12.1 '
                      'and torchvision 0.27.1 together')
        return
    yield Finding('torch', version)
    version, problem = version_of('torchvision'), import_problem('torchvision')
    if 'torchvision::nms' in problem:
        yield Finding('torchvision', f'{version} was built for another torch '
                      f'(this is {version_of("torch")})', 'install a pair made for each other, '
                      'e.g. torch==2.12.1 torchvision==0.27.1 from one index')
    elif problem:
        yield Finding('torchvision', version or problem,
                      'pip install torchvision==0.27.1 (mmpretrain and mmdet need it)')
    else:
        yield Finding('torchvision', version)


def _setuptools() -> Iterator[Finding]:
    version = version_of('setuptools')
    if version is None or int(version.partition('.')[0]) >= 82:
        yield Finding('setuptools', version or 'not installed', 'pip install setuptools==79.0.1: '
                      'mim and `mmdet::` configs need pkg_resources, which 82 dropped')
    else:
        yield Finding('setuptools', version)


def _stacks() -> Iterator[Finding]:
    official = [name for name in _OFFICIAL if version_of(name)]
    forks = [name for name in _FORKS if version_of(name)]
    if official and forks:
        yield Finding('OpenMMLab', f'both {", ".join(official)} and {", ".join(forks)}',
                      'uninstall one of the two sets: they share their import names and '
                      'overwrite each other')
    for module in ('mmengine', 'mmcv'):
        names = [name for name, target in {**_OFFICIAL, **_FORKS}.items() if target == module]
        version = next((v for name in names if (v := version_of(name))), None)
        problem = import_problem(module)
        remedy = f'run `make setup`, or `{_INSTALL[module]}`' if problem else ''
        if module == 'mmcv' and version_of('mmcv-lite'):
            version = f'{version_of("mmcv-lite")}, lite'
            if version_of('mmcv'):
                remedy = 'mmcv and mmcv-lite share their files: uninstall both, run `make setup`'
            elif _torchvision_operators() is None:
                remedy = 'mmcv-lite has no operators: uninstall it and install mmcv'
        yield Finding(module, version if version and not problem else problem, remedy)


def _mmcv_operators() -> Finding:
    problem = import_problem('mmcv.ops')
    if not problem and (operators := _torchvision_operators()):
        return Finding('mmcv operators', f'of torchvision: {", ".join(operators)}; all others are '
                       'missing (make setup MMCV=full compiles them)')
    if not problem:
        return Finding('mmcv operators', 'compiled and loading')
    if 'mmcv._ext' in problem and 'No module' in problem:
        return Finding('mmcv operators', 'mmcv was installed without its operators', _REBUILD)
    if 'undefined symbol' in problem or 'libtorch' in problem or 'libc10' in problem:
        return Finding('mmcv operators', f'mmcv was built for another torch ({problem})', _REBUILD)
    return Finding('mmcv operators', problem, _REBUILD)


def _torchvision_operators() -> tuple[str, ...] | None:
    """Names of the operators that requirements/mmcv_ext.py gives; None if it is not there."""
    if import_problem('mmcv._ext'):
        return None
    return getattr(sys.modules['mmcv._ext'], 'OPERATORS', None)


def _toolbox(distribution: str, module: str, needed_for: str) -> Finding:
    version = version_of(distribution) or version_of(
        {'mmdet': 'onedl-mmdetection'}.get(distribution, f'onedl-{distribution}'))
    if version is None:
        return Finding(module, 'not installed', f'run `make setup`, or `{_INSTALL[module]}` '
                       f'(for {needed_for})', required=False)
    problem = import_problem(f'{module}.models')
    return Finding(module, problem or version, problem and f'{needed_for} cannot be built: '
                   'run `make setup`, or reinstall it with the versions in '
                   'requirements/constraints.txt')


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
