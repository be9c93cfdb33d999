import copy

import pytest
import timm.layers
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.nn.functional import batch_norm
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import DropBlock2d, StochasticDepth

from fewshot.encoders.adaptable import (
    AdaptableConv2d,
    BatchStatisticsNorm2d,
    draws_random,
    make_adaptable,
    solves_together,
)
from fewshot.encoders.conv4 import Conv4
from fewshot.encoders.resnet12 import ResNet12
from fewshot.encoders.timm import TimmEncoder
from fewshot.errors import FewShotError


def make(channels=3, dtype=torch.float64):
    norm = nn.BatchNorm2d(channels, dtype=dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm, BatchStatisticsNorm2d(norm)


def images(*shape, last=True, dtype=torch.float64):
    made = torch.randn(*shape, dtype=dtype)
    return made.contiguous(memory_format=torch.channels_last) if last else made


def outputs(norm, ours, x):
    return batch_norm(x, None, None, norm.weight, norm.bias, training=True), ours(x)


@pytest.mark.parametrize("last", [False, True])
def test_batch_statistics_are_used_in_both_modes(last):
    torch.manual_seed(0)
    norm, ours = make()
    x = images(4, 3, 5, 6, last=last)
    for mode in (True, False):
        expected, found = outputs(norm, ours.train(mode), x)
        torch.testing.assert_close(found, expected)
    assert set(dict(ours.named_parameters())) == {"weight", "bias"} and not list(ours.buffers())


@pytest.mark.parametrize("last", [False, True])
def test_first_and_second_derivatives_of_batch_norm(last):
    torch.manual_seed(0)
    norm, ours = make(2)
    with torch.no_grad():
        norm.weight[0] = 0  # a channel with weight 0 still has a gradient
    x = images(3, 2, 4, 3, last=last).requires_grad_()

    def apply(x, weight, bias):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    assert gradcheck(apply, (x, norm.weight, norm.bias))
    assert gradgradcheck(apply, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_match_autograd_in_low_precision(dtype):
    torch.manual_seed(0)
    norm, ours = make(3, torch.float32)
    x = images(8, 3, 6, 6, dtype=torch.float32).to(dtype).requires_grad_()
    found = []
    for y in outputs(norm, ours, x):
        gradient = torch.autograd.grad(y.float().pow(3).mean(), [x, norm.weight], create_graph=True)
        loss = sum(tensor.float().square().sum() for tensor in gradient)
        found.append([second.float() for second in torch.autograd.grad(loss, [x, norm.weight])])
    # Both implementations round y, dy, dx, v and the result; the rounding of y counts twice, since dy is 3 y^2: 12
    # roundings in total. One is at most 2^-8 in bfloat16 (8 bits), whose sums are float32. In float32 (24 bits), sums
    # of 8 x 6 x 6 values round at each addition.
    close = 12 * {torch.bfloat16: 2**-8, torch.float32: 288 * 2**-24}[dtype]
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() < close * expected.norm()


def test_vmap_keeps_statistics_and_weights_per_task():
    torch.manual_seed(0)
    _, ours = make()
    x, weight, bias = torch.randn(4, 5, 3, 6, 6).double(), torch.randn(4, 3).double(), torch.randn(3).double()

    def apply(weight, x):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    alone = torch.stack([apply(*task) for task in zip(weight, x, strict=True)])
    torch.testing.assert_close(vmap(apply)(weight, x), alone)
    torch.testing.assert_close(
        vmap(apply, in_dims=(None, 1))(weight[0], x.movedim(0, 1)), vmap(apply)(weight[:1].expand(4, 3), x)
    )


def convolution(dtype=torch.float64, **settings):
    conv = nn.Conv2d(2, 3, dtype=dtype, **({"kernel_size": 3, "padding": 1} | settings))
    return conv, AdaptableConv2d(conv)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"stride": 2, "kernel_size": 2, "dilation": 2}])
@pytest.mark.parametrize("last", [False, True])
def test_convolution_and_its_first_and_second_derivatives(settings, last):
    torch.manual_seed(0)
    conv, ours = convolution(**settings)
    x = images(2, 2, 5, 4, last=last).requires_grad_()
    torch.testing.assert_close(ours(x), conv(x))

    def apply(x, *parameters):
        return torch.func.functional_call(ours, dict(zip(("weight", "bias"), parameters, strict=False)), x)

    assert gradcheck(apply, (x, *conv.parameters()))
    assert gradgradcheck(apply, (x, *conv.parameters()))


@pytest.mark.parametrize("with_x", [False, True])
@pytest.mark.parametrize("names", [["weight"], ["bias"], ["weight", "bias"]])
def test_second_derivatives_of_a_convolution_for_any_inputs(with_x, names):
    torch.manual_seed(0)
    found = []
    conv, ours = convolution()
    x = images(2, 2, 5, 4).requires_grad_(with_x)
    for layer in (conv, ours):
        inputs = [*([x] if with_x else []), *(getattr(conv, name) for name in names)]
        loss = layer(layer(x)[:, :2]).pow(3).sum()
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.autograd.grad(total, [conv.weight, conv.bias]))
    torch.testing.assert_close(*found)


def test_convolution_follows_autocast_like_pytorch():
    torch.manual_seed(0)
    conv, ours = convolution(torch.float32)
    x = torch.randn(2, 2, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x), conv(x), rtol=0, atol=0)
    ours(x).sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_vmap_keeps_convolution_weights_per_task():
    torch.manual_seed(0)
    _, ours = convolution()
    x, weight, bias = torch.randn(4, 5, 2, 6, 6).double(), torch.randn(4, 3, 2, 3, 3).double(), torch.randn(3).double()

    def apply(weight, x):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    alone = torch.stack([apply(*task) for task in zip(weight, x, strict=True)])
    torch.testing.assert_close(vmap(apply)(weight, x), alone)


@pytest.mark.parametrize("twice", [False, True])
def test_trainable_layers_are_replaced_and_share_their_parameters(twice):
    grouped, frozen = nn.Conv2d(2, 2, 3, groups=2), nn.BatchNorm2d(2).requires_grad_(False)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), nn.BatchNorm2d(2), grouped, frozen
    )
    names, parameters = list(network.state_dict()), list(network.parameters())
    make_adaptable(network, twice)
    layers = network[0], network[1][0], network[2]
    assert [*map(type, layers)] == [AdaptableConv2d, BatchStatisticsNorm2d, BatchStatisticsNorm2d]
    assert all(layer.twice == twice for layer in layers)
    assert network[3] is grouped and network[4] is frozen
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert set(network.state_dict()) < set(names)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tasks_side_by_side_keep_their_statistics_and_weights(twice, bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten()).double()
    make_adaptable(network, twice)
    assert solves_together(network)
    weights = {name: torch.randn(4, *value.shape).double() for name, value in network.named_parameters()}
    x = torch.randn(5, 4, 2, 6, 6).double()  # images, then tasks
    together = torch.func.functional_call(network, weights, x.flatten(1, 2)).unflatten(1, (4, -1))
    for task in range(4):
        own = {name: weight[task] for name, weight in weights.items()}
        torch.testing.assert_close(together[:, task], torch.func.functional_call(network, own, x[:, task]))


def test_only_layers_that_never_mix_channels_allow_tasks_side_by_side():
    allowed = [Conv4(1, 16, filters=2), Conv4(1, 16, filters=2, pool="mean"), Conv4(1, 16, filters=2, signed=True)]
    grouped, frozen, half = nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3).requires_grad_(False), nn.Conv2d(2, 2, 3)
    half.bias.requires_grad_(False)
    refused = [ResNet12(1, 16), *map(nn.Sequential, (grouped, frozen, half, nn.Linear(2, 2)))]
    for network in (*allowed, *refused):
        make_adaptable(network, twice=True)
        assert solves_together(network) == (network in allowed)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.RReLU(), DropBlock2d(0.1, 3), StochasticDepth(0.1, "row")]
)
def test_layers_that_draw_random_numbers_in_training_are_known(layer):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(layer))
    assert draws_random(network) and not draws_random(network.eval())


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), StochasticDepth(0.0, "row"), nn.ReLU(), nn.Identity()])
def test_layers_that_drop_nothing_draw_no_random_numbers(layer):
    assert not draws_random(nn.Sequential(nn.Conv2d(1, 2, 3), layer))


SUBCLASSES = {
    "timm's batch norm": lambda: timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU),
    "timm's batch norm without activation": lambda: timm.layers.BatchNormAct2d(4, apply_act=False),
    "standardised convolution": lambda: timm.layers.StdConv2d(4, 4, 3),
    "convolution with padding of its own": lambda: timm.layers.Conv2dSame(4, 4, 3, stride=2),
    "convolution with a computed weight": lambda: weight_norm(nn.Conv2d(4, 4, 3)),
    "whole network": lambda: TimmEncoder("mobilenetv3_small_050", pretrained=False, frozen=False, size=32),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_layers_of_other_libraries_compute_the_same(kind, twice):
    torch.manual_seed(0)
    network = nn.Sequential(SUBCLASSES[kind]()).double().train()
    adaptable = copy.deepcopy(network)
    make_adaptable(adaptable, twice)
    names = [name for name, _ in network.named_parameters()]
    assert [name for name, _ in adaptable.named_parameters()] == names
    x = images(6, 3, 32, 32) if "network" in kind else images(6, 4, 9, 9)
    torch.testing.assert_close(adaptable(x), network(x))


def test_a_batch_norm_that_computes_something_else_is_refused():
    class Other(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(images) + 1

    with pytest.raises(FewShotError, match=r"layer Other, a batch norm .*encoder\.frozen=true"):
        make_adaptable(nn.Sequential(Other(3)), twice=True)
