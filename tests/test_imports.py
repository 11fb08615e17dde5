"""What importing the package loads, and which room knows which."""

import ast

import pytest
from helpers import ROOT, run

import orepa_mm

#: A room imports only from rooms before it.
FLOORS = ('version', 'files', 'errors', 'logs', 'layers', 'reparam', 'checkpoints', 'backbones',
          'openmmlab', 'datasets', 'export', 'engine', 'analysis', 'workflow')
#: They look at everything: the doctor, and the package's own door.
EXEMPT = ('doctor', 'orepa_mm')
PACKAGE = ROOT / 'orepa_mm'
FILES = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)
#: Prints the toolboxes, and their models, that are loaded.
LOADED = ("print('loaded:', [name for box in ('mmdet', 'mmpretrain', 'mmseg') "
          "for name in (box, f'{box}.models') if name in sys.modules])")


def modules_of(path):
    """Dotted name of a file, and the package that its relative imports start from."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    package = parts[:-1]
    return '.'.join(package if parts[-1] == '__init__' else parts), package


MODULES = {modules_of(path)[0] for path in FILES}


def room(module):
    return module.split('.')[1] if '.' in module else module


def imported_rooms(path, text=None):
    """Rooms of ours that a file imports from, anywhere in it: at the top, in functions, for types.

    `from .. import x` and `import orepa_mm.x` count as what they load.
    """
    package = modules_of(path)[1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            base = '.'.join([*above, *filter(None, [node.module])])
            names |= {f'{base}.{alias.name}' if f'{base}.{alias.name}' in MODULES else base
                      for alias in node.names}
    ours = {name for name in names if name.split('.')[0] == 'orepa_mm'}
    return {room(name) for name in ours} - {room(modules_of(path)[0])}


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_lower_floors(path):
    own = room(modules_of(path)[0])
    if own in EXEMPT:
        return
    assert own in FLOORS, f'{own} is a new room: give it a floor'
    above = imported_rooms(path) - {*FLOORS[:FLOORS.index(own)]}
    assert not above, f'{own} must not import from {", ".join(sorted(above))}'


@pytest.mark.parametrize(('line', 'found'), [
    ('from ..workflow import deploy', {'workflow'}),
    ('from .. import workflow', {'workflow'}),
    ('from ..workflow.deploy import f', {'workflow'}),
    ('import orepa_mm.workflow.deploy', {'workflow'}),
    ('from orepa_mm.workflow import f', {'workflow'}),
    ('from orepa_mm import reparameterize', {'orepa_mm'}),
    ('def f():\n    from ..workflow import g', {'workflow'}),
    ('from .base import f', set()),
    ('from workflow import f', set()),
])
def test_no_kind_of_import_is_overlooked(line, found):
    assert imported_rooms(PACKAGE / 'layers' / 'base.py', line) == found


#: Begins a script in which PyTorch is there, and nothing of OpenMMLab, NumPy or SciPy.
TORCH_ALONE = """
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'numpy', 'scipy', 'matplotlib',
             'cv2'):
    sys.modules[name] = None
"""


def test_layers_need_pytorch_alone():
    """Imported, trained, given a kernel, written into, copied, converted."""
    output = run('-W', 'error::UserWarning:orepa_mm', '-c', TORCH_ALONE + """
import copy, logging
import torch
import orepa_mm
from orepa_mm import layers
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
model = torch.nn.Sequential(layers.build_orepa_conv(3, 8, 7), layers.build_orepa_conv(8, 8, 3),
                            layers.build_dbb_conv(8, 8, 3, padding=1),
                            layers.build_orepa_conv(8, 4, 1))
with layers.cached():
    model(torch.rand(2, 3, 16, 16)).sum().backward()
model[1].start_from(torch.rand(8, 8, 3, 3))
torch.nn.init.zeros_(model[0].weight)
torch.nn.init.constant_(model[1].weight, float('inf'))
plain = layers.replace_with_conv2d(copy.deepcopy(model))
print('plain:', {type(layer).__name__ for layer in plain})
print('loaded:', [name for name in ('mmengine', 'mmcv', 'numpy') if sys.modules[name]])
""", fresh=True)
    assert "plain: {'Conv2d'}" in output
    assert 'loaded: []' in output
    assert 'WARNING:orepa_mm:values that are not finite' in output


def test_importing_loads_no_toolbox():
    assert 'loaded: []' in run('-W', 'error::UserWarning', '-c', f'import sys, orepa_mm; {LOADED}',
                              fresh=True)


def test_a_segmentation_config_loads_no_detector():
    """Building it loads mmseg's models, which load mmdet's by themselves; ours add nothing."""
    output = run('-c', f'''
import sys
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
import orepa_mm  # without it the forks' MMEngine does not find mmseg::
cfg = Config.fromfile('configs/upernet/upernet_orepa-r18-light_400i_cityscapes-192x192.py')
init_default_scope(cfg.default_scope)
{LOADED}
MODELS.build(cfg.model.backbone)
print('ours:', [name for name in ('det', 'seg', 'cls')
                if f'orepa_mm.backbones.{{name}}' in sys.modules])
''')
    assert 'loaded: []' in output
    assert "ours: ['seg']" in output


@pytest.mark.parametrize('name', ['reparameterize', 'verify'])
def test_public_at_the_top(name):
    assert callable(getattr(orepa_mm, name))
    assert name in dir(orepa_mm)
    assert name in orepa_mm.__all__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"'orepa_mm' has no attribute 'nonsense'"):
        _ = orepa_mm.nonsense
