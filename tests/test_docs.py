"""What the documentation shows runs: every ```python block, and every `>>>` of the docstrings.

What a block is shows by itself. Where it only sets names to literals and `dict(...)`, it is a
config: merged over its `_base_`, or over `BASE` where it has none, and everything in it is built.
Where it sets a part of a config, such as `backbone=dict(...)`, each of its statements is put where
`PARTS` says. Anything else is Python: it runs after the Python blocks before it on the same page,
with `NAMESPACE` for what a reader has at hand; `...` stands for his own lines and does nothing.
"""

import ast
import doctest
import importlib
import re
import textwrap

import pytest
import torch
from helpers import ROOT, on_meta_device
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

from orepa_mm.layers import OREPAConv2d, reparam_layers

BASE = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
PARTS = {'backbone': 'model = dict({})', 'conv_cfg': 'model = dict(neck=dict({}))'}
NAMESPACE = {
    'torch': torch, 'nn': nn, 'images': torch.rand(2, 3, 16, 16),
    'model': nn.Sequential(OREPAConv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).eval()}


def blocks():
    """{page: {line: text}} of all blocks in Python."""
    fence = re.compile(r'^ *```python\n(.*?)^ *```', re.MULTILINE | re.DOTALL)
    found = {}
    for page in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))):
        text = page.read_text()
        found[page.name] = {text.count('\n', 0, match.start()) + 1: textwrap.dedent(match[1])
                            for match in fence.finditer(text)}
    return found


BLOCKS = blocks()


def config_texts(block):
    """The configs that a block stands for; none if it is Python."""
    statements = ast.parse(block).body
    called = [node.func for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    if not all(isinstance(s, ast.Assign) for s in statements) or not all(
            isinstance(function, ast.Name) and function.id == 'dict' for function in called):
        return []
    if all(s.targets[0].id in PARTS for s in statements):
        return [BASE + PARTS[s.targets[0].id].format(ast.unparse(s).replace(' = ', '=', 1))
                for s in statements]
    return [block if '_base_' in block else BASE + block]


def build_config(text):
    """Build the model without memory, its hooks and its optimizer; the model and the hooks."""
    cfg = Config.fromstring(text, '.py')
    init_default_scope(cfg.default_scope)
    cfg.model.pop('pretrained', None)
    with on_meta_device():
        model = MODELS.build(cfg.model)
    build_optim_wrapper(model, cfg.optim_wrapper)
    return model, [HOOKS.build(hook) for hook in cfg.get('custom_hooks', [])]


@pytest.mark.parametrize(('page', 'line'), [
    pytest.param(page, line, id=f'{page}:{line}') for page, lines in BLOCKS.items()
    for line in lines])
def test_block(page, line):
    block = BLOCKS[page][line]
    texts = config_texts(block)
    for text in texts:
        model, hooks = build_config(text)
        if 'OREPA' in block:
            assert list(reparam_layers(model)), text
        assert len(hooks) == text.count('Hook')
    if not texts:
        names = dict(NAMESPACE)
        for number, earlier in BLOCKS[page].items():
            if number <= line and not config_texts(earlier):
                exec(compile(earlier, f'{page}:{number}', 'exec'), names)


def test_there_are_blocks_of_every_kind():
    """Else a page that is written otherwise would not be looked at."""
    kinds = {(bool(texts), len(texts) > 1) for lines in BLOCKS.values() for block in lines.values()
             for texts in [config_texts(block)]}
    assert kinds == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize(('broken', 'named'), [
    ('from orepa_mm import nonsense', 'nonsense'),
    ('deployed = reparameterize(model)', 'reparameterize'),
    ("conv_cfg=dict(type='OREPA', single_start=True)", 'single_start'),
    ("backbone=dict(type='OREPAResNet', deepth=50)", 'deepth'),
    ("custom_hooks = [dict(type='ReparamTestHook', verify=1)]", 'verify'),
    ("optim_wrapper = dict(constructor='OREPAOptimWrapper')", 'OREPAOptimWrapper'),
])
def test_a_block_that_does_not_run_is_noticed(broken, named, monkeypatch):
    monkeypatch.setitem(BLOCKS, 'page.md', {1: broken})
    with pytest.raises(Exception, match=named):
        test_block('page.md', 1)


MODULES = ['.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
           for path in sorted((ROOT / 'orepa_mm').rglob('*.py'))
           if '.mim' not in path.parts and '>>> ' in path.read_text()]
DOCTESTS = [test for name in MODULES
            for test in doctest.DocTestFinder().find(importlib.import_module(name))
            if test.examples]


@pytest.mark.parametrize('test', DOCTESTS, ids=lambda test: test.name)
def test_docstring(test):
    MMLogger.get_current_instance()  # made here, it does not write into what doctest reads
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_docstrings():
    assert 'orepa_mm.reparam.reparameterize.reparameterize' in {test.name for test in DOCTESTS}
