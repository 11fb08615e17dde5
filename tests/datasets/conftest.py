from pathlib import Path

import pytest
from mmengine.registry import DATASETS, DefaultScope


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
