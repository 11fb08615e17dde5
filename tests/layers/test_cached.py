"""`cached()`: a layer is squeezed once, with the results and gradients of one squeezed each time.

The forward pass of an MMEngine model is such a context.
"""

import asyncio
import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from batches import tiny_batch
from helpers import LAYERS, expected_output, randomize, relative_error, vary_scales
from mmdet.registry import MODELS
from mmengine.model import (
    BaseModel,
    ExponentialMovingAverage,
    MMDistributedDataParallel,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from orepa_mm.layers import OREPAConv2d, ReparamConv2d, cached, reparam_layers, sharing
from orepa_mm.openmmlab.patches import patch


@pytest.fixture
def squeezes(monkeypatch):
    """The layers that are squeezed, in order."""
    found = []
    for kind in {type(build()) for build in LAYERS.values()}:
        def counted(self, *args, squeeze=kind.squeeze):
            found.append(self)
            return squeeze(self, *args)

        monkeypatch.setattr(kind, 'squeeze', counted)
    return found


class Levels(BaseModel):
    """One block on several levels, as in the head of a detector."""

    def __init__(self, case='kxk of RepVGG'):
        super().__init__()
        self.conv = randomize(LAYERS[case]())

    def forward(self, x, between=None):
        first = self.conv(x)
        if between is not None:
            between(self)
        return first.square().mean() + sum(
            self.conv(x[..., ::step, ::step]).square().mean() for step in (2, 3))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or not found[name].any(), name
        if gradient.any():
            assert relative_error(found[name], gradient) < tolerance, name


def unscoped(model, *args, **kwargs):
    """A forward pass that squeezes at each call."""
    return model.forward(*args, **kwargs)


@pytest.mark.parametrize('case', LAYERS)
def test_gradients_are_those_of_a_squeeze_at_each_call(case, x, squeezes):
    model, x = Levels(case).double(), x.double()
    expected = gradients(model, unscoped(model, x))
    assert len(squeezes) == 3
    squeezes.clear()
    assert_same(gradients(model, model(x)), expected, 1e-10)
    assert squeezes == [model.conv]


def retinanet():
    init_default_scope('mmdet')
    norm = dict(type='BN')
    model = MODELS.build(dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor', mean=[128.] * 3, std=[64.] * 3),
        backbone=dict(type='ResNet', depth=18, base_channels=4, norm_cfg=norm),
        neck=dict(type='FPN', in_channels=[4, 8, 16, 32], out_channels=8, num_outs=5),
        bbox_head=dict(
            type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=4,
            conv_cfg=dict(type='OREPA'),
            anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                                  ratios=[1.0], strides=[4, 8, 16, 32, 64])),
        train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.4,
                                     min_pos_iou=0), allowed_border=-1, pos_weight=-1),
        test_cfg=dict(nms_pre=10, nms=dict(type='nms', iou_threshold=.5), max_per_img=5)))
    vary_scales(model)
    return model.train()


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_a_training_step_of_retinanet_squeezes_its_head_once(device, squeezes):
    """The head is called on five levels."""
    model = retinanet()
    batch = model.data_preprocessor(tiny_batch('mmdet'), True)
    unscoped(model, **batch, mode='loss')
    assert len(squeezes) == 40
    squeezes.clear()
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0), accumulative_counts=2)
    model.zero_grad()
    for _ in range(2):  # accumulated gradients: each half of one
        model.train_step(tiny_batch('mmdet'), optimizer)
    assert len(squeezes) == 16
    assert set(squeezes[:8]) == set(reparam_layers(model)) == set(squeezes[8:])


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_gradients_of_retinanet(device):
    model = retinanet().double()
    batch = model.data_preprocessor(tiny_batch('mmdet'), True)
    batch['inputs'] = batch['inputs'].double()

    def loss(call):
        return model.parse_losses(call(**batch, mode='loss'))[0]

    expected = gradients(model, loss(model.forward))
    assert_same(gradients(model, loss(model)), expected, 1e-10)
    accumulated = gradients(model, loss(model) + 2 * loss(model))
    assert_same({name: value / 3 for name, value in accumulated.items()}, expected, 1e-10)


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('outside', ['before', 'between', 'after', 'nowhere'])
def test_checkpointed_segments(use_reentrant, outside, squeezes):
    """A layer in two segments, twice in one of them, and outside of them as well."""
    class Net(BaseModel):
        def forward(self, x, segments):
            def run(x):
                return self.conv(self.conv(x).relu())

            def call(x):
                return checkpoint(run, x, use_reentrant=use_reentrant) if segments else run(x)

            x = self.conv(x) if outside == 'before' else x
            x = call(x)
            x = self.conv(x) if outside == 'between' else x
            x = call(x)
            return (self.conv(x) if outside == 'after' else x).square().mean()

    model = Net()
    model.conv = randomize(LAYERS['kxk of RepVGG'](), 1).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, unscoped(model, x, False))
    squeezes.clear()
    loss = model(x, True)
    # reentrant segments run without a graph first, and may share a kernel among them
    assert len(squeezes) == (1 if use_reentrant else 4) + (outside != 'nowhere')
    assert_same(gradients(model, loss), expected, 1e-10)
    with cached():  # whose recomputation lies inside as well
        assert_same(gradients(model, model(x, True)), expected, 1e-10)


def test_saved_tensors_on_the_cpu(x):
    model = Levels()
    expected = gradients(model, unscoped(model, x))
    with torch.autograd.graph.save_on_cpu():
        loss = model(x)
    assert_same(gradients(model, loss), expected, 1e-5)


def test_a_pytorch_that_does_not_tell_of_checkpointing(x, monkeypatch, squeezes):
    model = Levels()
    monkeypatch.setattr(sharing, '_top_hooks', None)
    model(x)
    assert len(squeezes) == 3


def test_a_backward_pass_inside_a_forward_pass(x):
    layer = randomize(LAYERS['kxk']())
    x.requires_grad_()
    expected = gradients(layer, layer(x).square().sum())
    with cached():
        for _ in range(2):  # frees the graph behind the kernel
            assert_same(gradients(layer, layer(x).square().sum()), expected, 1e-5)
        torch.autograd.grad(layer(x).sum(), x)  # does not
        assert_same(gradients(layer, layer(x).square().sum()), expected, 1e-5)


FUSED = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad


def fused_step(layer, kind=torch.optim.SGD):
    """Fused optimizers write into parameters and advance no version counter."""
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    versions = [parameter._version for parameter in layer.parameters()]
    kind(layer.parameters(), lr=0.5, fused=True).step()
    assert versions == [parameter._version for parameter in layer.parameters()]
    layer.zero_grad()


CHANGES = {
    'in place': lambda layer: [p.mul_(2) for p in layer.parameters()],
    'one value': lambda layer: layer.weight_rbr_origin[0, 0, 0, 0].add_(5),
    'new data': lambda layer: setattr(layer.vector, 'data', layer.vector.data * 3),
    'new parameter': lambda layer: setattr(layer, 'vector', nn.Parameter(layer.vector * 3)),
    'buffer': lambda layer: [buffer.mul_(2) for buffer in layer.buffers()],
    'set_kernel': lambda layer: layer.set_kernel(layer.weight.detach() * 2),
    'written into weight': lambda layer: layer.weight.data.mul_(2),
    'load': lambda layer: layer.load_state_dict(randomize(copy.deepcopy(layer), 1).state_dict()),
    'assigned to weight': lambda layer: setattr(
        layer, 'weight', nn.Parameter(layer.weight.detach() * 2)),
    'start_from': lambda layer: layer.start_from(layer.weight.detach() * 2),
    'swapped': lambda layer: torch.utils.swap_tensors(
        layer.vector, nn.Parameter(layer.vector.detach() * 3)),
    **{f'fused {kind.__name__}': lambda layer, kind=kind: fused_step(layer, kind)
       for kind in FUSED},
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('grad', [True, False])
def test_a_layer_that_changes_in_the_middle(change, grad, x):
    model = Levels()
    outputs = []
    model.conv.register_forward_hook(lambda conv, args, y: outputs.append(
        relative_error(y, expected_output(conv, *args))))

    def between(model):
        before = model.conv.equivalent_kernel_bias()[0]
        with torch.no_grad():
            CHANGES[change](model.conv)
        assert relative_error(model.conv.equivalent_kernel_bias()[0], before) > 0.01

    with torch.set_grad_enabled(grad):
        model(x, between)
    assert len(outputs) == 3
    assert max(outputs) < 1e-5


def test_with_and_without_gradients_in_one_pass(x, squeezes):
    """Also in inference mode, whose tensors cannot be used outside of it."""
    layer = randomize(LAYERS['kxk']())
    with cached():
        for _ in range(2):
            with torch.inference_mode():
                layer(x)
            with torch.no_grad():
                assert not layer(x).requires_grad
            assert layer(x).requires_grad
            with torch.autocast('cpu', torch.bfloat16):
                layer(x)
    assert len(squeezes) == 3
    layer(x).sum().backward()


def test_transforms_inside_a_forward_pass(x):
    layer = randomize(LAYERS['kxk']())

    def run():
        parameters = dict(layer.named_parameters())

        def called(parameters):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        return [torch.func.grad(lambda x: layer(x).square().sum())(x), layer(x),
                torch.func.grad(called)(parameters)['vector'],
                torch.func.vmap(lambda x: layer(x[None])[0])(x),
                torch.func.jvp(called, (parameters,), (parameters,))[1], layer(x)]

    expected = run()
    with cached():
        for one, other in zip(run(), expected):
            assert relative_error(one, other) < 1e-5


def test_what_is_handed_out_is_not_what_is_shared(x):
    layer = randomize(LAYERS['kxk']())
    with cached():
        expected = layer(x)
        layer.weight.untyped_storage().fill_(7)
        assert torch.equal(layer(x), expected)


def test_a_parametrization_is_computed_at_each_call(x, squeezes):
    class Twice(nn.Module):
        def forward(self, value):
            return value * 2

    model = Levels('kxk')
    nn.utils.parametrize.register_parametrization(model.conv, 'vector', Twice())
    model(x)
    assert len(squeezes) == 3


def test_nothing_outlives_a_pass(x):
    """No kernel, no graph; also where the pass fails."""
    kernels = []

    class Net(Levels):
        def forward(self, x, fails):
            loss = super().forward(x)
            kernels.extend(weakref.ref(kernel) for _, kernel in sharing.current().kernels.values())
            if fails:
                raise ValueError('planted')
            return loss

    model = Net()
    model(x, False).backward()
    with pytest.raises(ValueError, match='planted'):
        model(x, True)
    loss = model(x, False)
    assert len(kernels) == 3
    assert kernels[2]() is not None  # autograd needs it
    assert sharing.current() is None
    assert not sharing._open.contexts
    del loss
    gc.collect()
    assert [kernel() for kernel in kernels] == [None] * 3


def test_a_copy_in_the_middle(x, squeezes):
    copies = []
    model = Levels()
    loss = model(x, lambda model: copies.append(copy.deepcopy(model)))
    assert squeezes == [model.conv]
    expected = gradients(model, loss)
    assert_same(gradients(copies[0], copies[0](x)), expected, 1e-5)


def test_a_teacher_inside_a_model(x, squeezes):
    """A model in a model shares its pass; averages are written through `.data` before theirs."""
    class Student(Levels):
        def forward(self, x):
            self.teacher.update_parameters(self.student)
            with torch.no_grad():
                target = self.teacher(x)
            return (self.student(x) + super().forward(x) - target).square()

    model = Student()
    model.student = Levels('kxk')
    model.teacher = ExponentialMovingAverage(model.student, momentum=0.5)
    teacher = model.teacher.module.conv
    seen = []
    teacher.register_forward_hook(
        lambda conv, args, y: seen.append((y, copy.deepcopy(conv), *args)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        squeezes.clear()
        model(x).backward()
        assert sorted(map(id, squeezes)) == sorted(map(id, (
            model.conv, model.student.conv, teacher)))
        optimizer.step()
    for y, conv, images in seen:
        assert relative_error(y, expected_output(conv, images)) < 1e-5


def test_each_thread_has_its_own(x, squeezes):
    layer = randomize(LAYERS['kxk']())
    with cached():
        layer(x)
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
        layer(x)
    assert len(squeezes) == 2


def test_distributed_data_parallel(x, tmp_path, squeezes):
    model = Levels()
    expected = gradients(model, unscoped(model, x))
    dist.init_process_group('gloo', f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        wrapped = MMDistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False)
        for _ in range(2):
            squeezes.clear()
            assert_same(gradients(wrapped.module, wrapped(x)), expected, 1e-5)
            assert len(squeezes) == 1
    finally:
        dist.destroy_process_group()


def test_models_without_our_layers_are_called_as_ever(x):
    class Stock(BaseModel):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x, mode='tensor'):
            return self.conv(x), mode

    model, seen = Stock(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)),
                                    with_kwargs=True)
    y, mode = model(x, mode='loss')
    assert mode == 'loss'
    assert torch.equal(y, model.conv(x))
    assert seen == [((x,), {'mode': 'loss'})]
    call = BaseModel.__call__
    patch()
    assert BaseModel.__call__ is call


def test_contexts_in_one_another_are_one(x, squeezes):
    layer = OREPAConv2d(4, 4, 3, padding=1)
    with cached():
        with cached():
            layer(x)
        layer(x)
    assert len(squeezes) == 1


# --- who shares with whom ---------------------------------------------------------------


@pytest.mark.parametrize('case', LAYERS)
@pytest.mark.parametrize('order', [(False, True), (True, False), (True, False, True, True)])
def test_gradients_that_are_switched_on_and_off_in_a_pass(order, case, x):
    """Each call has the gradients that it has outside of the context."""
    layer, x = randomize(LAYERS[case]()).double(), x.double()

    def loss():
        total = 0
        for number, flag in enumerate(order, 1):
            layer.requires_grad_(flag)
            total = total + layer(x * number).square().mean()
        layer.requires_grad_(True)
        return total

    expected = gradients(layer, loss())
    with cached():
        found = loss()
    assert_same(gradients(layer, found), expected, 1e-10)


def test_one_branch_that_is_frozen_between_two_calls(x, squeezes):
    layer = randomize(LAYERS['kxk']()).double()
    x = x.double()

    def loss():
        first = layer(x).sum()
        layer.vector.requires_grad_(False)
        total = first + layer(2 * x).square().sum()
        layer.vector.requires_grad_(True)
        return total

    expected = gradients(layer, loss())
    with cached():
        found = loss()
    assert_same(gradients(layer, found), expected, 1e-10)
    assert len(squeezes) == 4


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('case', LAYERS)
def test_losses_that_go_backward_one_after_the_other(case, dtype, x):
    """As of a stock layer: nobody asks for retain_graph."""
    class Two(BaseModel):
        def forward(self, x):
            return self.conv(x).square().mean(), self.conv(2 * x).mean()

    model = Two()
    model.conv = randomize(LAYERS[case]()).to(dtype)
    x = x.to(dtype)
    expected = gradients(model, sum(model.forward(x)))
    model.zero_grad()
    for loss in model(x):
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same(found, expected, 64 * torch.finfo(dtype).eps)


def test_a_branch_that_is_written_between_forward_and_backward(x):
    """PyTorch's own error for stock layers."""
    layer = randomize(LAYERS['kxk']())
    loss = layer(x).sum()
    with torch.no_grad():
        layer.weight_orepa_origin.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an in-place operation'):
        loss.backward()


def suspended():
    with cached():
        yield


def test_a_suspended_generator_leaves_nothing_open_in_its_caller(x, squeezes):
    layer, generator = randomize(LAYERS['kxk']()), suspended()
    next(generator)
    assert sharing.current() is None
    for _ in range(2):
        assert relative_error(layer(x), expected_output(layer, x)) < 1e-5
        layer.vector.data.mul_(2)
    assert len(squeezes) == 4
    del generator
    assert not sharing._open.contexts


def test_a_generator_shares_in_its_own_frame(x, squeezes):
    layer = randomize(LAYERS['kxk']())

    def levels():
        with cached():
            for step in (1, 2, 3):
                yield layer(x[..., ::step, ::step])

    for y in levels():
        layer(x)  # of the caller
        assert y.requires_grad
    assert len(squeezes) == 1 + 3


def test_a_generator_that_another_thread_closes(x):
    generators = [suspended()]
    next(generators[0])
    thread = threading.Thread(target=generators.clear)
    thread.start()
    thread.join()
    assert not sharing._open.contexts


def test_tasks_that_take_turns(x, squeezes):
    layer = randomize(LAYERS['kxk']())

    async def loss():
        with cached():
            first = layer(x)
            await asyncio.sleep(0)
            return (first * layer(x)).sum()

    async def both():
        return await asyncio.gather(loss(), loss())

    total = sum(asyncio.run(both()))
    assert len(squeezes) == 2
    assert_same(gradients(layer, total), gradients(layer, 2 * (layer(x) * layer(x)).sum()), 1e-4)


def test_a_graph_that_is_recorded_inside_holds_no_kernel_of_outside(x):
    """`make_fx`, and any other dispatch mode, squeezes for itself."""
    layer = randomize(LAYERS['kxk']())
    parameters = dict(layer.named_parameters())
    doubled = {name: 2 * p for name, p in parameters.items()}

    def run(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))

    with torch.no_grad(), cached():
        layer(x)
        graph = make_fx(run)(parameters, x)
        assert relative_error(graph(doubled, x), run(doubled, x)) < 1e-5
        constant = make_fx(lambda x: layer(x))(x)  # parameters are attributes of the graph
        layer.vector.mul_(3)
        assert relative_error(constant(x), layer(x)) < 1e-5


def test_a_block_of_the_users_own_shares_what_has_no_gradient(x):
    """PyTorch's graph of it is gone through once."""
    class Own(ReparamConv2d):
        squeezes = 0

        def __init__(self):
            super().__init__(4, 4, 3, bias=False)
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

        def squeeze(self, dtype=None, device=None):
            self.squeezes += 1
            return self.kernel.exp()

        def _reference(self):
            return self.kernel

    layer = Own()
    with cached():
        losses = layer(x).sum(), layer(x).sum()
        for loss in losses:
            loss.backward()
        assert layer.squeezes == 2
        with torch.no_grad():
            layer(x), layer(x)
    assert layer.squeezes == 3


# --- outside of a context nothing is remembered -------------------------------------------


def teacher_of_mmengine(layer, kind, **options):
    average = kind(layer, **options).eval()
    return average, lambda: average.update_parameters(layer)


def teacher_by_data(layer):
    teacher = copy.deepcopy(layer).eval()

    def update():
        for mine, theirs in zip(teacher.parameters(), layer.parameters()):
            mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)
    return teacher, update


def teacher_by_numpy(layer):
    teacher = copy.deepcopy(layer).eval()

    def update():
        for parameter in teacher.parameters():
            parameter.detach().cpu().numpy()[...] *= 1.1
    return teacher, update


TEACHERS = {
    'ExponentialMovingAverage': lambda layer: teacher_of_mmengine(
        layer, ExponentialMovingAverage, momentum=0.5),
    'StochasticWeightAverage': lambda layer: teacher_of_mmengine(layer, StochasticWeightAverage),
    'MomentumAnnealingEMA': lambda layer: teacher_of_mmengine(layer, MomentumAnnealingEMA),
    'AveragedModel of PyTorch': lambda layer: teacher_of_mmengine(
        layer, AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    '.data': teacher_by_data,
    'NumPy': teacher_by_numpy,
}


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
@pytest.mark.parametrize('kind', TEACHERS)
def test_a_teacher_in_eval_mode_follows_its_weights_of_each_step(device, kind, x):
    student = nn.Sequential(*(randomize(build()) for build in (LAYERS['kxk'], lambda: OREPAConv2d(
        6, 4, 3)))).train()
    teacher, update = TEACHERS[kind](student)
    with torch.no_grad():
        for _ in range(4):
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            update()
            assert relative_error(teacher(x), copy.deepcopy(teacher)(x)) < 1e-6


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
@pytest.mark.parametrize('kind', FUSED)
def test_a_look_in_eval_mode_between_steps_of_a_fused_optimizer(device, kind, x):
    layer = randomize(LAYERS['kxk']()).eval()
    optimizer = kind(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        layer(x).square().mean().backward()
        with torch.no_grad():
            before = layer(x)
            optimizer.step()
            after = layer(x)
            assert relative_error(after, expected_output(layer, x)) < 1e-5
        assert relative_error(after, before) > 1e-3


def test_threads_that_evaluate_train_and_change_modes(x):
    """Each its own; nothing of the process is switched."""
    layer, errors, stop = randomize(LAYERS['kxk']()).eval(), [], threading.Event()
    expected = layer(x).detach()
    precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()

    def work(call):
        while not stop.is_set():
            try:
                call()
            except Exception as error:
                errors.append(repr(error))
                return

    def look():
        with torch.no_grad(), cached():
            for _ in range(2):
                assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(call,)) for call in (
            look, look, lambda: layer(x).sum().backward(), lambda: layer.train().eval())]
        for thread in threads:
            thread.start()
        stop.wait(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors
    assert precision == (torch.backends.cuda.matmul, torch.get_float32_matmul_precision())
