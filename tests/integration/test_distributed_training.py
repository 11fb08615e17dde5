"""Gradients and steps of detectors and segmentors in two processes, against one at the joint batch.

Both draw the same: the kernels' gradients are averaged, and those of the branches are linear in
them. Whether a detector's equal those of the joint batch is up to its head: the loss of one that
divides by the positives of its own process (RetinaNet) does only where these have as many, one
that reduces that number (FCOS) does; samplers of Faster R-CNN draw for each process.
"""

import pytest
import torch
from helpers import relative_error
from two_processes import compared_gradients, together, trained

#: The boxes of the images are in float32, and so is what heads sum and divide of them.
FLOAT32 = 16 * torch.finfo(torch.float32).eps
FLOAT64 = 1e-11
#: Largest relative difference; None: they differ.
CASES = {('retinanet', True): FLOAT32, ('retinanet', False): None, ('fcos', False): FLOAT32,
         ('faster_rcnn', False): None, ('upernet', False): FLOAT64}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    return together(compared_gradients, tmp_path_factory.mktemp('gradients') / 'group', *CASES)


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(relative_error(one[key], other[key]) for key in one if other[key].any())


@pytest.mark.parametrize('case', CASES)
def test_branches_get_the_gradient_of_the_averaged_kernels(found, case):
    """The plain network in two processes is the oracle; rounding differs, NMS is in float32."""
    tolerance = 1e-4 if case[0] == 'faster_rcnn' else FLOAT64
    for processes in (1, 2):
        gradients = found[0][case]
        assert len(gradients['training', processes]) > len(gradients['plain', processes]) + 50
        assert largest_difference(gradients['training', processes],
                                  gradients['expected', processes]) < tolerance
    assert all(torch.equal(value, found[1][case]['training', 2][key])
               for key, value in found[0][case]['training', 2].items())


@pytest.mark.parametrize('form', ['training', 'plain'])
@pytest.mark.parametrize('case', CASES)
def test_which_networks_get_the_gradient_of_the_joint_batch(found, case, form):
    difference = largest_difference(found[0][case][form, 2], found[0][case][form, 1])
    assert difference < CASES[case] if CASES[case] else difference > 0.1


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """{(network, passes in a step): what each of two processes has, and what one has}."""
    folder = tmp_path_factory.mktemp('steps')
    two = together(trained, folder / 'two', folder / 'runs2', ('fcos', 1), ('upernet', 2))
    one, = together(trained, folder / 'one', folder / 'runs1', ('fcos', 1), ('upernet', 1),
                    processes=1)
    return {name: (two[0][name, passes], two[1][name, passes], one[name, 1])
            for name, passes in (('fcos', 1), ('upernet', 2))}


@pytest.mark.parametrize('name', ['fcos', 'upernet'])
def test_three_steps_and_their_average(runs, name):
    first, second, one = runs[name]
    trained = [key for key in one['before'] if one['before'][key].is_floating_point()
               and 'running_' not in key and not torch.equal(one['before'][key], one['after'][key])]
    assert len(trained) > 200
    for which in ('after', 'average'):
        for key in trained:
            assert torch.equal(first[which][key], second[which][key]), (which, key)
    # MMEngine averages after each pass, also where that is no step
    for which in ('after', 'average') if name == 'fcos' else ('after',):
        for key in trained:
            step = (one['after'][key] - one['before'][key]).abs().max()
            assert (first[which][key] - one[which][key]).abs().max() < 2e-3 * step, (which, key)
