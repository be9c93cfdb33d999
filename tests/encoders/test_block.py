import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from benchmarks import training
from benchmarks.contest import Contest, Entrant, run
from fewshot.encoders.block import Block

SHAPE = {"size": 84, "channels": 3, "classes": 10, "images": 12, "way": 5, "shot": 4, "query": 6, "steps": 1}


def make(channels=2, filters=4, size=6, last=True):
    torch.manual_seed(0)
    block = Block(channels, filters).double()
    nn.init.normal_(block[1].weight), nn.init.normal_(block[1].bias)
    with torch.no_grad():
        block[1].weight[0] = -1.5  # its minima are the maxima of the textbook
        block[1].weight[1] = 0
    images = torch.randn(3, channels, size, size + 1, dtype=torch.float64)
    return block, images.to(memory_format=torch.channels_last) if last else images


def gradients(output, inputs, **settings):
    return torch.autograd.grad((output * torch.arange(output.numel()).view_as(output)).sum(), inputs, **settings)


@pytest.mark.parametrize("last", [False, True])
def test_outputs_gradients_and_statistics_are_those_of_the_layers(last, monkeypatch):
    monkeypatch.setattr("fewshot.encoders.block.CHUNK", 1)  # image after image
    ours, images = make(last=last)
    plain = nn.Sequential(*copy.deepcopy(ours))
    for _ in range(2):  # running statistics change with each step
        found, expected = ours(images), plain(images)
        assert found.grad_fn.name().startswith("_PooledNorm") and not expected.grad_fn.name().startswith("_PooledNorm")
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            gradients(found, list(ours.parameters())), gradients(expected, list(plain.parameters())), strict=True
        ):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    assert ours[1].num_batches_tracked == 2


def test_first_and_second_derivatives():
    block, images = make(1, 3, 4)
    block[1].weight.data[1] = 0.5  # at zero, every value is a maximum
    names = dict(block.named_parameters())

    def apply(images, *weights):
        return functional_call(block, dict(zip(names, weights, strict=True)), images)

    inputs = images.requires_grad_(), *names.values()
    assert gradcheck(apply, inputs)
    assert gradgradcheck(apply, inputs)


def test_layers_that_are_frozen_or_replaced_are_left_as_they_are():
    block, images = make()
    assert block.eval()(images).grad_fn.name().startswith("Relu")
    block.train()[0].requires_grad_(False)
    assert len(gradients(block(images), [block[1].weight])) == 1
    block[1] = nn.InstanceNorm2d(4, affine=True).double()
    torch.testing.assert_close(block(images), nn.Sequential(*block)(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert Block(2, 4)(images.float()).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_step_at_84x84_takes_less_memory_than_the_textbook():
    settings = {"shape": SHAPE}
    entrants = [
        Entrant("ours", training.bare_loop, settings, keep_memory=True),
        Entrant("textbook", training.textbook, settings),
    ]
    results = run(Contest("memory", entrants, tolerance=1e-2), rounds=2)
    ours, textbook = (result["peak_bytes"] for result in results)
    assert ours < 1.2 * textbook, (ours, textbook)
