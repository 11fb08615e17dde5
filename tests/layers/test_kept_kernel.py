"""The kernel that a layer keeps in eval mode: when it is kept, and that it is never stale."""

import copy

import pytest
import torch
from helpers import LAYERS, expected_output, randomize, relative_error, train_one_step
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import register_parametrization

from orepa_mm.layers import forget_kernels


def count_squeezes(layer, monkeypatch):
    calls = []
    squeeze = type(layer).squeeze
    monkeypatch.setattr(type(layer), 'squeeze',
                        lambda self, *args: (calls.append(1) if self is layer else None,
                                             squeeze(self, *args))[1])
    return calls


def test_kernel_is_kept_in_eval_mode_without_gradients(layer, x, monkeypatch):
    calls = count_squeezes(layer.eval(), monkeypatch)
    with torch.no_grad():
        layer(x), layer(x), layer.weight
    assert len(calls) == 1
    layer(x)  # a gradient could flow
    assert len(calls) == 2
    layer.requires_grad_(False)
    layer(x), layer(x)
    assert len(calls) == 3
    layer.train()
    layer(x), layer(x)
    assert len(calls) == 5


def test_a_teacher_that_is_written_through_data(layer, x):
    """MMDetection's MeanTeacherHook: the loop calls train(), the detector teacher.eval()."""
    layer.eval().requires_grad_(False)
    with torch.no_grad():
        layer(x)
        for _ in range(3):
            layer.train()
            for parameter in layer.parameters():
                parameter.data.mul_(1.1)
            layer.eval()
            assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


def test_a_frozen_stage_keeps_its_kernel_through_training(layer, x, monkeypatch):
    layer.eval().requires_grad_(False)
    layer.frozen = True
    calls = count_squeezes(layer, monkeypatch)
    for _ in range(3):
        layer(x)
        layer.train(), layer.eval()  # the loop, and the backbone that froze it
    assert len(calls) == 1


def test_a_frozen_stage_whose_averages_are_evaluated(layer, x):
    """Exchanged through `.data`, evaluated, exchanged back, trained on."""
    layer.eval().requires_grad_(False)
    layer.frozen = True
    layer(x), layer.train(), layer.eval(), layer(x)
    for factor in (1.5, 1 / 1.5):
        for parameter in layer.parameters():
            parameter.data.mul_(factor)
        if factor > 1:
            layer.eval()
        else:
            layer.train(), layer.eval()
        assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


@pytest.mark.parametrize('optimizer', [
    lambda p: torch.optim.AdamW(p, 0.1, fused=True), lambda p: torch.optim.SGD(p, 0.1, fused=True),
    lambda p: torch.optim.AdamW(p, 0.1, foreach=True)])
def test_fused_optimizers_write_without_a_trace(layer, x, optimizer):
    """Fine-tuning in eval mode: their steps advance no version counter."""
    layer.eval()
    step = optimizer(layer.parameters())
    for _ in range(2):
        with torch.no_grad():
            layer(x)
        layer(x).square().mean().backward()
        step.step()
        with torch.no_grad():
            assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


def test_another_layout_at_the_same_address(x):
    layer = randomize(LAYERS['1x1']()).eval()
    with torch.no_grad():
        layer(x)
        first = layer.weight_or1x1_l2i_conv1
        first.data = first.data.transpose(0, 1)
        assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


def test_new_content_at_an_old_address(x):
    """What is kept holds its sources' memory, or the second write would be put there."""
    layer = randomize(LAYERS['kxk']()).eval()
    with torch.no_grad():
        layer(x)
        address, others = layer.vector.data_ptr(), []
        layer.vector.data = layer.vector.data * 3
        for _ in range(1000):  # until an allocator gives the memory out again
            if layer.vector.data_ptr() == address:
                break
            others.append(layer.vector.data)
            layer.vector.data = layer.vector.data.clone()
        assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


def test_dual_numbers_at_the_address_of_the_parameters(x):
    """Forward-mode derivatives, which no_grad leaves on: same memory, another tensor."""
    layer = randomize(LAYERS['kxk']()).eval()
    parameters = dict(layer.named_parameters())

    def run(parameters):
        return torch.func.functional_call(layer, parameters, (x,))

    expected = torch.func.jvp(run, (parameters,), (parameters,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        layer(x)
        duals = {name: forward_ad.make_dual(p, p) for name, p in parameters.items()}
        assert relative_error(forward_ad.unpack_dual(run(duals)).tangent, expected) < 1e-5


def test_a_parametrization_may_compute_from_anything(x):
    class Times(nn.Module):
        factor = 1.0

        def forward(self, value):
            return value * self.factor

    layer, times = randomize(LAYERS['kxk']()).eval(), Times()
    register_parametrization(layer, 'vector', times)
    with torch.no_grad():
        layer(x)
        times.factor = 3.0
        assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


def test_a_replica_of_data_parallel_has_gradients(layer, x):
    """It has tensors for attributes, and no parameters."""
    replica = layer.eval()._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter if parameter is None else parameter.clone())
    for name, child in layer.named_children():
        inner = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            setattr(inner, key, parameter if parameter is None else parameter.clone())
        setattr(replica, name, inner)
    replica(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def change_in_place(layer):
    with torch.no_grad():
        next(iter(layer.parameters())).mul_(2)  # the bias
        next(p for p in layer.parameters() if p.dim() == 4).add_(1)


def change_by_replacement(layer):
    owner = layer if hasattr(layer, 'vector') else layer.weight1
    owner.vector = nn.Parameter(owner.vector.detach() * 3)


def change_by_data(layer):
    owner = layer if hasattr(layer, 'vector') else layer.weight1
    owner.vector.data = owner.vector.data * 3


CHANGES = {
    'in place': change_in_place,
    'optimizer': train_one_step,
    'new parameter': change_by_replacement,
    'new data': change_by_data,
    'load': lambda layer: layer.load_state_dict(randomize(copy.deepcopy(layer), 1).state_dict()),
    'assign': lambda layer: layer.load_state_dict(
        randomize(copy.deepcopy(layer), 1).state_dict(), assign=True),
    'buffer': lambda layer: [b.mul_(2) for b in layer.buffers()],
    'written through .data, then eval()': lambda layer: (
        [p.data.mul_(2) for p in layer.parameters()], layer.eval()),
    'written through .data, then forgotten': lambda layer: (
        [p.data.copy_(p.data.flip(0)) for p in layer.parameters()], forget_kernels(layer)),
}


@pytest.mark.parametrize('index', range(8))
def test_kept_kernel_follows_a_write_into_any_one_branch(x, index):
    layer = randomize(LAYERS['kxk'](bias=False)).eval()
    with torch.no_grad():
        before = layer(x)
        list(layer.parameters())[index].flatten()[0].add_(0.5)
        assert not torch.allclose(before, layer(x))
        assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


@pytest.mark.parametrize('change', CHANGES)
def test_kept_kernel_follows_every_change(layer, x, change):
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer)
        after = layer(x)
        assert relative_error(after, expected_output(layer, x)) < 1e-4
        if change != 'buffer' or list(layer.buffers()):
            assert not torch.allclose(before, after)


def test_kept_kernel_follows_dtype(layer, x):
    layer.eval()
    with torch.no_grad():
        layer(x)
        layer.double()
        assert relative_error(layer(x.double()), expected_output(layer, x.double())) < 1e-12


def test_what_is_handed_out_is_not_what_is_kept(layer, x):
    """Also a write that no tensor class could see does no harm."""
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
        layer.weight.untyped_storage().fill_(7)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_kernel_is_read_in_inference_mode(layer, mode):
    getattr(layer, mode)()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(layer.weight * 2, layer.weight + layer.weight)


def test_kernel_kept_in_inference_mode_can_be_used_outside(layer, x):
    layer.eval().requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize('case', LAYERS)
def test_tensors_without_content_work(case, x):
    """Shape inference: on the meta device and with fake tensors."""
    expected = LAYERS[case]()(x).shape
    with torch.no_grad():
        meta = LAYERS[case](device='meta').eval()
        for _ in range(2):
            assert meta(x.to('meta')).shape == expected
        with FakeTensorMode() as mode:
            fake = LAYERS[case]().eval()
            for _ in range(2):
                assert fake(mode.from_tensor(x)).shape == expected


def test_inference_tensors_as_parameters(x):
    with torch.inference_mode():
        layer = randomize(LAYERS['kxk']()).eval()
        for _ in range(2):
            assert relative_error(layer(x), expected_output(layer, x)) < 1e-5


def test_ensembles_of_layers_under_vmap(x):
    layers = [randomize(LAYERS['kxk'](), seed).eval() for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)

    def run(parameters, buffers):
        return torch.func.functional_call(layers[0], (parameters, buffers), x)

    with torch.no_grad():
        found = torch.func.vmap(run)(parameters, buffers)
        for one, layer in zip(found, layers):
            assert relative_error(one, layer(x)) < 1e-5


def test_tracing_follows_the_parameters(x):
    layer = randomize(LAYERS['kxk']()).eval().requires_grad_(False)
    layer(x)
    traced = torch.jit.trace(layer, x)
    layer.vector.mul_(2)
    assert relative_error(traced(x), layer(x)) < 1e-5


def test_eval_mode_still_gives_gradients(layer, x):
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_moving_average_of_the_parameters(layer, x):
    """EMA averages branches; the kernel must follow the averaged branches."""
    average = ExponentialMovingAverage(layer, momentum=0.5)
    average.eval()
    with torch.no_grad():
        average(x)
    train_one_step(layer)
    average.update_parameters(layer)  # the first call copies
    average.eval()  # as MMEngine's loops do: the averages are written through .data
    first = [p.clone() for p in layer.parameters()]
    with torch.no_grad():
        assert relative_error(average(x), layer(x)) < 1e-5
    train_one_step(layer)
    average.update_parameters(layer)
    average.eval()
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for p, old in zip(expected.parameters(), first):
            p.copy_(0.5 * p + 0.5 * old)
        assert relative_error(average(x), expected_output(expected, x)) < 1e-5
