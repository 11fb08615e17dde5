from pathlib import Path

import pytest
from mmengine.registry import DATASETS, DefaultScope

from orepa_mm.datasets import make_shapes_cityscapes, make_shapes_coco, make_shapes_imagenet


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where converted annotations go: not into the user's own cache."""
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    return folder


@pytest.fixture
def build_datasets():
    """The three data sets of a config, as its runner would build them."""
    def build(cfg):
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            return [DATASETS.build(cfg[f'{name}_dataloader'].dataset)
                    for name in ('train', 'val', 'test')]
    return build


@pytest.fixture
def all_files():
    """Every file below a folder with its content."""
    def read(root):
        return {path.relative_to(root): path.read_bytes()
                for path in sorted(Path(root).rglob('*')) if path.is_file()}
    return read


@pytest.fixture
def coco(tmp_path):
    return make_shapes_coco(tmp_path / 'coco', 3, 2, 64)


@pytest.fixture
def streets(tmp_path):
    return make_shapes_cityscapes(tmp_path / 'streets', 3, 2, 64)


@pytest.fixture
def classes(tmp_path):
    return make_shapes_imagenet(tmp_path / 'classes', 24, 12, 32)
