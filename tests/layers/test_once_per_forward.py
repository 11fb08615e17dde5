"""A layer that is called several times in one forward pass of its model is squeezed once."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from batches import tiny_batch
from helpers import LAYERS, expected_output, randomize, relative_error, vary_scales
from mmdet.registry import MODELS
from mmengine.model import BaseModel, ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.checkpoint import checkpoint

from orepa_mm.layers import OREPAConv2d, reparam_layers, scope, squeezed_once


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
    with squeezed_once():  # whose recomputation lies inside as well
        assert_same(gradients(model, model(x, True)), expected, 1e-10)


def test_saved_tensors_on_the_cpu(x):
    model = Levels()
    expected = gradients(model, unscoped(model, x))
    with torch.autograd.graph.save_on_cpu():
        loss = model(x)
    assert_same(gradients(model, loss), expected, 1e-5)


def test_a_pytorch_that_does_not_tell_of_checkpointing(x, monkeypatch, squeezes):
    model = Levels()
    monkeypatch.setattr(scope, '_top_hooks', None)
    model(x)
    assert len(squeezes) == 3


def test_a_backward_pass_inside_a_forward_pass(x):
    layer = randomize(LAYERS['kxk']())
    x.requires_grad_()
    expected = gradients(layer, layer(x).square().sum())
    with squeezed_once():
        for _ in range(2):  # frees the graph behind the kernel
            assert_same(gradients(layer, layer(x).square().sum()), expected, 1e-5)
        torch.autograd.grad(layer(x).sum(), x)  # does not
        assert_same(gradients(layer, layer(x).square().sum()), expected, 1e-5)


CHANGES = {
    'in place': lambda layer: [p.mul_(2) for p in layer.parameters()],
    'one value': lambda layer: layer.weight_rbr_origin[0, 0, 0, 0].add_(5),
    'new data': lambda layer: setattr(layer.vector, 'data', layer.vector.data * 3),
    'new parameter': lambda layer: setattr(layer, 'vector', nn.Parameter(layer.vector * 3)),
    'buffer': lambda layer: [buffer.mul_(2) for buffer in layer.buffers()],
    'set_kernel': lambda layer: layer.set_kernel(layer.weight.detach() * 2),
    'written into weight': lambda layer: layer.weight.data.mul_(2),
    'load': lambda layer: layer.load_state_dict(randomize(copy.deepcopy(layer), 1).state_dict()),
    'written through .data, then forgotten': lambda layer: (
        [p.data.mul_(2) for p in layer.parameters()], layer.forget_kernel()),
    'written through .data, then train()': lambda layer: (
        [p.data.mul_(2) for p in layer.parameters()], layer.train()),
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
    with squeezed_once():
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
    with squeezed_once():
        for one, other in zip(run(), expected):
            assert relative_error(one, other) < 1e-5


def test_what_is_handed_out_is_not_what_is_shared(x):
    layer = randomize(LAYERS['kxk']())
    with squeezed_once():
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
            kernels.extend(weakref.ref(kept.kernel) for modes in scope._open.get().values()
                           for kept in modes.values())
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
    assert scope._open.get() is None
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
            self.teacher.train()  # which forgets
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
    with squeezed_once():
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
    scope.open_in_forward_passes()
    assert BaseModel.__call__ is call


def test_scopes_in_one_another_are_one(x, squeezes):
    layer = OREPAConv2d(4, 4, 3, padding=1)
    with squeezed_once():
        with squeezed_once():
            layer(x)
        layer(x)
    assert len(squeezes) == 1
