"""Packaging of orepa_mm. The configs and tools travel in the wheel, where mim finds them."""

import runpy
import shutil
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
MIM_CONTENT = ('configs', 'tools', 'model-index.yml')


class BuildPy(build_py):
    """Copy what mim looks for into `orepa_mm/.mim` of the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in MIM_CONTENT:
            target = Path(self.build_lib) / 'orepa_mm' / '.mim' / name
            if (ROOT / name).is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(ROOT / name, target,
                                ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
            else:
                self.copy_file(str(ROOT / name), str(target))


class Develop(develop):
    """Link the source tree into the environment, and what mim looks for into `orepa_mm/.mim`."""

    def run(self):
        if hasattr(develop, 'install_for_development'):
            super().run()
        else:  # since setuptools 80 it makes an install that no mim can follow
            self.link()
        # the forks' mim takes the first file in this list for the place of the package
        (ROOT / 'orepa_mm.egg-info' / 'SOURCES.txt').unlink(missing_ok=True)
        folder = ROOT / 'orepa_mm' / '.mim'
        folder.mkdir(exist_ok=True)
        for name in MIM_CONTENT:
            link = folder / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(Path('..') / '..' / name)

    def link(self):
        """Leave the two files by which pip knows such an install, and can undo it."""
        self.run_command('egg_info')
        packages = Path(sysconfig.get_path('purelib'))
        (packages / 'orepa-mm.egg-link').write_text(f'{ROOT}\n.')
        paths = packages / 'easy-install.pth'
        known = paths.read_text().splitlines() if paths.exists() else []
        paths.write_text('\n'.join(dict.fromkeys([*known, str(ROOT)])) + '\n')


setup(
    name='orepa_mm',
    version=runpy.run_path(str(ROOT / 'orepa_mm' / 'version.py'))['__version__'],
    description='Online Convolutional Re-parameterization (OREPA) for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['orepa_mm', 'orepa_mm.*']),
    python_requires='>=3.10',
    install_requires=['torch>=2.6', 'numpy', 'filelock'],
    # Two stacks share their import names and must never be installed together, so neither is a
    # hard requirement. mmcv is in none: it is compiled for the torch at hand, or mmcv-lite with
    # the operators of torchvision (requirements/install.py).
    extras_require={
        'openmmlab': ['torchvision', 'mmengine>=0.10.7', 'mmdet>=3.3.0', 'mmsegmentation>=1.2.2',
                      'ftfy', 'regex', 'mmpretrain>=1.2.0', 'scipy>=1.10', 'openmim>=0.3.9',
                      'setuptools<82'],
        'onedl': ['torchvision', 'onedl-mmengine>=0.10.12', 'onedl-mmdetection>=3.5.1',
                  'onedl-mmsegmentation>=1.4.2', 'onedl-mmpretrain>=1.3.6', 'scipy>=1.10',
                  'onedl-mim>=0.5.1', 'setuptools<82'],
        'onnx': ['onnx', 'onnxscript', 'onnxruntime'],
        'safetensors': ['safetensors'],
        'test': ['pytest', 'pytest-xdist', 'hypothesis', 'timm', 'tensorboard'],
        # mkdocstrings for Python 3.10 needs this pymdown-extensions
        'dev': ['ruff', 'mypy', 'mkdocs', 'mkdocs-material', 'mkdocstrings', 'mkdocstrings-python',
                'pymdown-extensions==10.19'],
    },
    cmdclass={'build_py': BuildPy, 'develop': Develop},
    zip_safe=False,
)
