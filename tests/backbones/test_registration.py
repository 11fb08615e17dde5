"""The same names in all three packages, and clear errors where one is missing."""

import subprocess
import sys
from importlib import metadata
from importlib.metadata import packages_distributions

import pytest
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, DefaultScope

import orepa_mm  # noqa: F401
from orepa_mm.backbones import registration
from orepa_mm.backbones.registration import PACKAGES, resolved

NARROW = dict(depth=18, base_channels=8)


@pytest.mark.parametrize('package', PACKAGES)
def test_the_scope_of_the_config_decides(package):
    scope = DefaultScope.get_instance(f'test {package}', scope_name=package)
    with DefaultScope.overwrite_default_scope(scope.scope_name):
        for name in PACKAGES[package][2]:
            with MODELS.switch_scope_and_registry(None) as registry:
                backbone = registry.get(f'{package}.{name}')
            assert registry.scope == package
            assert backbone.__name__ == name
            stock = MODELS.get(backbone.stock_type if '.' in backbone.stock_type
                               else f'{package}.{backbone.stock_type}')
            assert issubclass(backbone, stock)
            assert stock.__module__.startswith(
                'mmpretrain' if name == 'OREPARepVGG' else package)


def test_repvgg_is_found_from_every_package():
    for package in PACKAGES:
        with MODELS.switch_scope_and_registry(package) as registry:
            found = resolved(registry.get('OREPARepVGG'))
            assert found.__module__ == 'orepa_mm.backbones.cls'


def test_a_name_of_another_scope_says_where_it_belongs():
    expected = r"belongs to mmseg, mmpretrain.*type='mmseg\.OREPARes"
    with (MODELS.switch_scope_and_registry('mmdet') as registry,
          pytest.raises(ImportError, match=expected)):
        registry.build(dict(type='OREPAResNetV1c', **NARROW))


HIDE = '''
import importlib.util, sys
hidden = {hidden!r}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in hidden:
            raise ModuleNotFoundError('No module named ' + repr(name), name=name)
sys.meta_path.insert(0, Finder())
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in hidden else original(name, *a)
import orepa_mm
from mmengine.registry import MODELS
def error(scope, **cfg):
    try:
        with MODELS.switch_scope_and_registry(scope) as registry:
            registry.build(cfg)
    except ImportError as failure:
        return str(failure)
    return ''
'''
INSTALL = {module: packages_distributions()[module][0] for module in PACKAGES}
CHECKS = {
    'mmdet': f'''
assert MODELS.build(dict(type='mmdet.OREPAResNet', depth=18, base_channels=8))
for name, package in (('mmseg.OREPAResNetV1c', '{INSTALL['mmseg']}'),
                      ('mmpretrain.OREPAResNet', '{INSTALL['mmpretrain']}'),
                      ('OREPARepVGG', '{INSTALL['mmpretrain']}'),
                      ('OREPAResNetV1c', '{INSTALL['mmseg']}')):
    message = error('mmdet', type=name)
    assert 'pip install ' + package in message, (name, message)
''',
    'mmseg': f'''
assert MODELS.build(dict(type='mmseg.OREPAResNetV1c', depth=18, base_channels=8))
assert 'pip install {INSTALL['mmdet']}' in error('mmseg', type='mmdet.OREPAResNet')
assert 'pip install {INSTALL['mmpretrain']}' in error('mmseg', type='OREPARepVGG')
''',
    'mmpretrain': f'''
assert MODELS.build(dict(type='mmpretrain.OREPAResNet', depth=18, base_channels=8))
assert MODELS.build(dict(type='OREPARepVGG', arch='A0', base_channels=8))
message = error('mmpretrain', type='mmseg.OREPAResNetV1c')
assert 'pip install {INSTALL['mmseg']}' in message
'''}


@pytest.mark.parametrize('only', CHECKS)
def test_with_one_package_the_names_of_the_others_say_what_is_missing(only):
    hidden = tuple(package for package in PACKAGES if package != only)
    result = subprocess.run([sys.executable, '-c', HIDE.format(hidden=hidden) + CHECKS[only]],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'UserWarning' not in result.stderr  # nothing is broken


@pytest.mark.parametrize('forks', [True, False])
def test_mmengine_knows_the_forks_where_its_own_is_installed(forks, monkeypatch):
    official = {'mmdet': 'mmdet', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}
    for package, name in official.items():
        monkeypatch.setitem(MODULE2PACKAGE, package, name)

    def version(name):
        if forks and name == 'onedl-mmengine':
            return '0.10.12'
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(registration.metadata, 'version', version)
    registration.know_forks()
    found = {package: MODULE2PACKAGE[package] for package in official}
    assert found == ({'mmdet': 'onedl-mmdetection', 'mmseg': 'onedl-mmsegmentation',
                      'mmpretrain': 'onedl-mmpretrain'} if forks else official)
