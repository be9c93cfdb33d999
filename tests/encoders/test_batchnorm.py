import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap
from torch.nn.functional import batch_norm

from fewshot.encoders.batchnorm import BatchStatisticsNorm2d, use_batch_statistics


def make(channels=3, dtype=torch.float64):
    norm = nn.BatchNorm2d(channels, dtype=dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm, BatchStatisticsNorm2d(norm)


def images(*shape, last=True, dtype=torch.float64):
    made = torch.randn(*shape, dtype=dtype)
    return made.contiguous(memory_format=torch.channels_last) if last else made


def of_both(norm, ours, x):
    return batch_norm(x, None, None, norm.weight, norm.bias, training=True), ours(x)


@pytest.mark.parametrize("last", [False, True])
def test_it_is_batch_norm_of_the_batch_whatever_the_mode(last):
    torch.manual_seed(0)
    norm, ours = make()
    x = images(4, 3, 5, 6, last=last)
    for mode in (True, False):
        expected, found = of_both(norm, ours.train(mode), x)
        torch.testing.assert_close(found, expected)
    assert set(dict(ours.named_parameters())) == {"weight", "bias"} and not list(ours.buffers())


@pytest.mark.parametrize("last", [False, True])
def test_its_first_and_second_derivatives_are_right(last):
    torch.manual_seed(0)
    norm, ours = make(2)
    with torch.no_grad():
        norm.weight[0] = 0  # a channel switched off still has a gradient
    x = images(3, 2, 4, 3, last=last).requires_grad_()

    def apply(x, weight, bias):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    assert gradcheck(apply, (x, norm.weight, norm.bias))
    assert gradgradcheck(apply, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_agree_with_autograds_own_in_low_precision(dtype):
    torch.manual_seed(0)
    norm, ours = make(3, torch.float32)
    x = images(8, 3, 6, 6, dtype=torch.float32).to(dtype).requires_grad_()
    found = []
    for y in of_both(norm, ours, x):
        gradient = torch.autograd.grad(y.float().pow(3).mean(), [x, norm.weight], create_graph=True)
        loss = sum(of.float().square().sum() for of in gradient)
        found.append([of.float() for of in torch.autograd.grad(loss, [x, norm.weight])])
    close = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() < close * expected.norm()


def test_under_vmap_each_task_has_its_own_statistics_and_weights():
    torch.manual_seed(0)
    _, ours = make()
    x, weight, bias = torch.randn(4, 5, 3, 6, 6).double(), torch.randn(4, 3).double(), torch.randn(3).double()

    def apply(weight, x):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    alone = torch.stack([apply(of, one) for of, one in zip(weight, x, strict=True)])
    torch.testing.assert_close(vmap(apply)(weight, x), alone)
    torch.testing.assert_close(
        vmap(apply, in_dims=(None, 1))(weight[0], x.movedim(0, 1)), vmap(apply)(weight[:1].expand(4, 3), x)
    )


def test_every_batch_norm_is_replaced_and_shares_its_parameters():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), nn.BatchNorm2d(2))
    names, parameters = list(network.state_dict()), list(network.parameters())
    use_batch_statistics(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert set(network.state_dict()) < set(names)
