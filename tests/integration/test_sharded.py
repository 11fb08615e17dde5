"""A model that is shared out between two processes learns what it learns in one."""

import pytest
from helpers import relative_error
from sharded import WAYS, all_ways, steps
from two_processes import together


@pytest.fixture(scope='module')
def shared_out(tmp_path_factory):
    return together(all_ways, tmp_path_factory.mktemp('sharded') / 'both')


@pytest.fixture(scope='module')
def expected():
    return steps()


@pytest.mark.parametrize('way', WAYS)
def test_three_steps_and_what_is_computed_then(way, shared_out, expected):
    """In float64: what is left is the order of sums."""
    assert min(relative_error(expected[step + 1], expected[step]) for step in range(3)) > 1e-3
    for found in shared_out:
        assert relative_error(found[way], expected) < 1e-13
