"""Models of everybody: expanded, trained, re-parameterized and verified by plain PyTorch."""

import copy
import io

import pytest
import timm
import torch
import torchvision
from helpers import ROOT, relative_error, run
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orepa_mm import expand, reparameterize, verify
from orepa_mm.layers import OREPAConv1x1, OREPAConv2d, OREPAStemConv2d, reparam_layers
from orepa_mm.reparam import is_training_form


@pytest.fixture(autouse=True)
def device():
    """On the CPU alone: whole networks of others."""


# --- a network shaped as YOLOs are -------------------------------------------------------

class Conv(nn.Module):
    """Convolution, BN and activation; `fuse` of the model takes the BN away."""

    def __init__(self, c1, c2, k=1, s=1, g=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class RepConv(nn.Module):
    """Two branches and `fuse_convs`, after which `forward_fuse` is called."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels, 3, act=False), Conv(
            channels, channels, 1, act=False)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.conv1(x) + self.conv2(x))

    def forward_fuse(self, x):
        return self.act(self.conv(x))

    def fuse_convs(self):
        if hasattr(self, 'conv'):
            return
        dense, point = (fuse_conv_bn_eval(part.conv.eval(), part.bn.eval())
                        for part in (self.conv1, self.conv2))
        self.conv = nn.Conv2d(dense.in_channels, dense.out_channels, 3, padding=1
                              ).requires_grad_(False)
        self.conv.weight.data = dense.weight + nn.functional.pad(point.weight, [1] * 4)
        self.conv.bias.data = dense.bias + point.bias
        for name in ('conv1', 'conv2'):
            self.__delattr__(name)


class C2f(nn.Module):
    def __init__(self, c1, c2, n=1):
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, c2), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(nn.Sequential(Conv(self.c, self.c, 3), Conv(self.c, self.c, 3))
                               for _ in range(n))

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(parts[-1] + block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Concat(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1)


class Detect(nn.Module):
    """Boxes as distributions: a frozen convolution holds the numbers 0 to 15."""

    def __init__(self, channels, classes=2):
        super().__init__()
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(c, 16, 3), nn.Conv2d(16, 64, 1))
                                 for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(c, c, 3, g=c), nn.Conv2d(c, classes, 1))
                                 for c in channels)
        self.dfl = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = nn.Parameter(torch.arange(16.).view(1, 16, 1, 1))

    def forward(self, maps):
        boxes = torch.cat([cv(x).flatten(2) for cv, x in zip(self.cv2, maps)], 2)
        scores = torch.cat([cv(x).flatten(2) for cv, x in zip(self.cv3, maps)], 2)
        n, _, places = boxes.shape
        boxes = self.dfl(boxes.view(n, 4, 16, places).transpose(2, 1).softmax(1)).view(n, 4, places)
        return torch.cat([boxes, scores.sigmoid()], 1)


#: From where, what.
LAYOUT = [(-1, lambda: Conv(3, 16, 3, 2)), (-1, lambda: Conv(16, 32, 3, 2)),
          (-1, lambda: C2f(32, 32)), (-1, lambda: nn.Conv2d(32, 32, 3, 2, 1)),
          (-1, lambda: RepConv(32)), (-1, lambda: nn.Upsample(scale_factor=2)),
          ([-1, 2], Concat), (-1, lambda: C2f(64, 32)), ([7, 4], lambda: Detect([32, 32]))]


class YOLO(nn.Module):
    """Layers with numbers and sources as attributes, as a yaml file lists them."""

    def __init__(self):
        super().__init__()
        layers = []
        for number, (source, build) in enumerate(LAYOUT):
            layer = build()
            layer.i, layer.f, layer.type = number, source, type(layer).__name__
            layers.append(layer)
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        outputs = []
        for layer in self.model:
            if layer.f != -1:
                x = [x if j == -1 else outputs[j] for j in layer.f]
            x = layer(x)
            outputs.append(x)
        return x

    def fuse(self):
        """Of the whole model, in place."""
        for layer in self.modules():
            if isinstance(layer, Conv) and hasattr(layer, 'bn'):
                layer.conv = fuse_by_hand(layer.conv, layer.bn)
                delattr(layer, 'bn')
                layer.forward = layer.forward_fuse
            if isinstance(layer, RepConv):
                layer.fuse_convs()
                layer.forward = layer.forward_fuse
        return self


def fuse_by_hand(conv, bn):
    """New weight and bias for the same convolution object."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    conv.weight = nn.Parameter((conv.weight * scale.view(-1, 1, 1, 1)).detach())
    conv.register_parameter('bias', nn.Parameter(
        (bn.bias - bn.running_mean * scale).detach()))
    return conv.requires_grad_(False)


def vary(model):
    """Let every BN differ from its start; a frozen one of torchvision holds buffers."""
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, 'running_var') and layer.running_var is not None:
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.1)
    return model


def yolo():
    return vary(YOLO()).eval()


def images(size=64):
    return torch.rand(2, 3, size, size)


def step(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    return model.eval()


def test_a_yolo_there_and_back():
    model, x = yolo(), images()
    expanded = expand(model, exclude='*.dfl')
    assert relative_error(expanded(x), model(x)) < 1e-5
    # a layer of the list is a plain convolution, whose number and source the model reads
    assert isinstance(expanded.model[3], OREPAConv2d)
    assert (expanded.model[3].i, expanded.model[3].f, expanded.model[3].type) == (
        3, -1, 'Conv2d')
    step(expanded, x)
    for layer in reparam_layers(expanded):
        assert all(p.grad is not None for p in layer.parameters())
    deployed = reparameterize(expanded)
    assert relative_error(deployed(x), expanded(x)) < 1e-5
    assert verify(expanded, deployed, x).passed
    # its fuse_convs was called; the `fuse` of the whole, which takes all BN away, was not
    assert hasattr(deployed.model[4], 'conv')
    assert hasattr(deployed.model[0], 'bn')
    model.model[4].fuse_convs()
    model.load_state_dict(deployed.state_dict(), strict=True)
    model.model[4].forward = model.model[4].forward_fuse
    assert relative_error(model(x), expanded(x)) < 1e-5


@pytest.mark.parametrize('convert', [lambda model: model, reparameterize], ids=['', 'deployed'])
def test_fuse_of_a_yolo_on_our_layers(convert):
    model = step(expand(yolo(), exclude='*.dfl'), images())
    x = images()
    expected = model(x)
    fused = convert(copy.deepcopy(model).fuse())
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert relative_error(fused(x), expected) < 1e-5
    assert is_training_form(fused) == (convert is not reparameterize)
    fused = reparameterize(model).fuse()
    assert relative_error(fused(x), expected) < 1e-5


def test_what_trainers_do_with_a_yolo():
    """Average, half precision, whole-model pickles, a model made anew that takes what fits."""
    model, x = step(expand(yolo(), exclude='*.dfl'), images()), images()
    average = copy.deepcopy(model).eval()
    for tensor in average.parameters():
        tensor.requires_grad_(False)
    step(model, x)
    with torch.no_grad():
        for key, value in average.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(0.5).add_(0.5 * model.state_dict()[key])
    expected = average(x)
    assert relative_error(expected, model(x)) > 0
    assert relative_error(reparameterize(average)(x), expected) < 1e-5
    file = io.BytesIO()
    torch.save({'ema': copy.deepcopy(average).half(), 'model': None}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)['ema'].float()
    assert relative_error(loaded(x), expected) < 0.05
    anew = expand(yolo(), exclude='*.dfl')
    state = {key: value for key, value in loaded.state_dict().items()
             if anew.state_dict()[key].shape == value.shape}
    assert not anew.load_state_dict(state, strict=False).missing_keys
    assert relative_error(anew(x), loaded(x)) < 1e-6


def test_libreyolo():
    """The example of docs/any-model.md, where LibreYOLO is installed."""
    package = pytest.importorskip('libreyolo.models.yolo9.nn')
    model, x = vary(package.LibreYOLO9Model(config='t', nb_classes=2)).eval(), images(96)
    expanded = expand(model, exclude='head.dfl.*')

    def boxes(network):
        return network(x)['predictions']

    with torch.no_grad():
        expected = boxes(model)
        assert relative_error(boxes(expanded), expected) < 1e-4
        deployed = reparameterize(expanded)
        assert relative_error(boxes(deployed), expected) < 1e-4
        assert all(hasattr(block, 'conv') for block in deployed.modules()
                   if isinstance(block, package.RepConvN))
        assert relative_error(boxes(expanded.fuse()), expected) < 1e-4
        assert relative_error(boxes(reparameterize(expanded)), expected) < 1e-4


# --- torchvision and timm ----------------------------------------------------------------

def detections(model):
    """What its heads give, before anything is selected."""
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            features = self.model.backbone(x)
            features = list(features.values()) if isinstance(features, dict) else [features]
            if hasattr(self.model, 'rpn'):
                maps = self.model.rpn.head(features)
                return torch.cat([y.flatten(1) for kind in maps for y in kind], 1)
            return torch.cat([y.flatten(1) for y in self.model.head(features).values()], 1)
    return Raw()


class Segments(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)['out']


BARE = dict(weights=None, weights_backbone=None, num_classes=3)
MODELS = {
    'Faster R-CNN': lambda: detections(
        torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(**BARE)),
    'SSDlite': lambda: detections(
        torchvision.models.detection.ssdlite320_mobilenet_v3_large(**BARE)),
    'LR-ASPP': lambda: Segments(
        torchvision.models.segmentation.lraspp_mobilenet_v3_large(**BARE)),
    'DeepLabV3': lambda: Segments(
        torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(**BARE)),
    **{name: lambda name=name: timm.create_model(name, num_classes=3) for name in (
        'resnet18d', 'efficientnet_lite0', 'regnetx_002', 'ghostnet_050', 'repghostnet_050',
        'cspresnet50', 'hrnet_w18_small', 'mobilenetv4_conv_small_050', 'convnextv2_atto',
        'vgg11_bn', 'densenet121', 'dla34', 'edgenext_xx_small', 'lcnet_050', 'xception41')},
}
#: Quick, and one of each kind.
QUICK = ('Faster R-CNN', 'LR-ASPP', 'resnet18d', 'repghostnet_050', 'lcnet_050')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in MODELS])
def test_a_network_is_expanded_trained_and_deployed(name):
    model, x = vary(MODELS[name]()).eval(), images(96)
    stock = copy.deepcopy(model)
    expanded = expand(model)
    with torch.no_grad():
        assert relative_error(expanded(x), model(x)) < 1e-4
    convs = [m for m in model.modules() if type(m) is nn.Conv2d
             and m.kernel_size in ((1, 1), (3, 3), (5, 5))]
    assert len(list(reparam_layers(expanded))) >= len(convs) > 5
    step(expanded, x)
    for layer in reparam_layers(expanded):
        assert all(p.grad is not None or not p.requires_grad for p in layer.parameters())
    expected = expanded(x)
    deployed = reparameterize(expanded)
    assert relative_error(deployed(x), expected) < 1e-4
    assert not is_training_form(deployed)
    if name != 'repghostnet_050':  # whose blocks convert themselves
        report = verify(expanded, deployed, x)
        assert report.passed, report.explain()
        stock.load_state_dict(deployed.state_dict(), strict=True)
        assert relative_error(stock.eval()(x), expected) < 1e-4


def test_a_whole_detector_detects_the_same():
    """Boxes and scores after all selection, of a detector that needs lists of images."""
    model = vary(torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        **BARE, box_score_thresh=0.0)).eval()
    expanded = expand(model)
    deployed = reparameterize(expanded)
    photos = [torch.rand(3, 80, 120)]
    one, other = model(photos)[0], deployed(photos)[0]
    assert len(one['boxes']) == len(other['boxes']) > 0
    assert relative_error(other['scores'], one['scores']) < 1e-3
    losses = expanded.train()(photos, [{'boxes': torch.tensor([[5., 5., 50., 60.]]),
                                        'labels': torch.tensor([1])}])
    sum(losses.values()).backward()
    assert any(p.grad is not None for layer in reparam_layers(expanded)
               for p in layer.parameters())


# --- half precision ----------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('build', [
    lambda: nn.Conv2d(8, 12, 1), lambda: nn.Conv2d(8, 12, 3), lambda: nn.Conv2d(8, 8, 7, groups=8),
    lambda: nn.Conv2d(8, 12, 5, groups=2)])
def test_in_half_precision_every_value_is_that_of_the_convolution(build, dtype):
    """Small kernels as well: nothing is added to them."""
    conv = build().to(dtype)
    conv.weight.data *= torch.logspace(-3, 0, len(conv.weight)).view(-1, 1, 1, 1).to(dtype)
    block = expand(conv)
    assert torch.equal(block.weight, conv.weight)
    assert torch.equal(reparameterize(block).weight, conv.weight)


def test_what_half_precision_cannot_hold_is_left():
    model = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Conv2d(8, 64, 7)).half()
    expanded = expand(model)
    assert isinstance(expanded[0], OREPAConv1x1)
    assert type(expanded[1]) is nn.Conv2d
    assert isinstance(expand(model.float())[1], OREPAStemConv2d)
    with pytest.raises(ValueError, match='in half precision'):
        expand(nn.Conv2d(8, 12, 3).bfloat16(), dict(type='OREPA', start='published'))


# --- without OpenMMLab -------------------------------------------------------------------

def test_none_of_this_needs_openmmlab():
    """In a process that can import none of it, the page for any model runs."""
    page = (ROOT / 'docs' / 'any-model.md').read_text()
    blocks = [part.partition('```')[0] for part in page.split('```python\n')[1:]]
    assert len(blocks) > 2
    program = '\n'.join([
        'import sys',
        "for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'scipy', 'matplotlib'):",
        '    sys.modules[name] = None',
        *blocks, "print('all of it')"])
    assert 'all of it' in run('-c', program, fresh=True)


def test_expand_takes_a_class_and_names_a_type_that_it_does_not_know():
    assert isinstance(expand(nn.Conv2d(3, 4, 3), dict(type=OREPAConv2d)), OREPAConv2d)
    program = ("import sys; sys.modules.update(mmcv=None, mmengine=None)\n"
               "from torch import nn; from orepa_mm import expand\n"
               "try: expand(nn.Conv2d(3, 4, 3), dict(type='OREPAA'))\n"
               "except ValueError as error: print(error)")
    assert "type 'OREPAA': choose one of OREPA, DBB" in run('-c', program, fresh=True)
