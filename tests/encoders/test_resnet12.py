from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import leaky_relu, max_pool2d

from fewshot.encoders import feature_maps
from fewshot.encoders.resnet12 import ResNet12
from fewshot.errors import FewShotError


def textbook(block: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A block as described in the papers: ReLU before pooling."""
    return max_pool2d(leaky_relu(block.body(images) + block.shortcut(images), 0.1), 2)  # type: ignore[operator]


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 84)])
def test_output_matches_the_papers(channels, size):
    torch.manual_seed(0)
    encoder = ResNet12(channels, size).eval()
    images = torch.randn(2, channels, size, size)
    with torch.no_grad():
        expected = images
        for block in list(encoder)[:4]:
            expected = textbook(block, expected)
        found = encoder(images)
    torch.testing.assert_close(found, expected.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert found.shape == (2, encoder.features) == (2, 640)


def test_number_of_parameters():
    widths = [3, 64, 160, 320, 640]
    per_block = [9 * i * w + 2 * 9 * w * w + 3 * 2 * w + i * w + 2 * w for i, w in pairwise(widths)]
    assert sum(p.numel() for p in ResNet12(3, 84).parameters()) == sum(per_block)


def test_squares_are_dropped_in_training_only():
    torch.manual_seed(0)
    encoder, images = ResNet12(1, 84, drop=0.3), torch.randn(2, 1, 84, 84)
    with torch.no_grad():
        third = nn.Sequential(*list(encoder)[:3])
        assert 0.05 < (third(images) == 0).float().mean() < 0.5
        assert (third.eval()(images) != 0).all()
        encoder.eval()
        torch.testing.assert_close(encoder(images), encoder(images))


@pytest.mark.parametrize(("size", "dropped"), [(16, (1, 1)), (28, (3, 1)), (32, (3, 1)), (64, (5, 3)), (84, (5, 5))])
def test_squares_are_the_largest_that_fit_a_map(size, dropped):
    encoder = ResNet12(1, size, drop=0.1)
    assert tuple(block.drop.block_size for block in list(encoder)[2:4]) == dropped
    assert encoder(torch.randn(2, 1, size, size)).isfinite().all()


def test_mean_of_the_feature_maps_is_the_embedding():
    encoder, images = ResNet12(3, 84).eval(), torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        maps = feature_maps(encoder, images)
        torch.testing.assert_close(maps.mean((2, 3)), encoder(images))
    assert maps.shape == (2, 640, 5, 5)


@pytest.mark.parametrize("wrong", [{"size": 15}, {"channels": 0}, {"drop": 1.0}, {"drop": -0.1}])
def test_invalid_settings_are_rejected(wrong):
    with pytest.raises(FewShotError, match=f"{next(iter(wrong))}="):
        ResNet12(**{"channels": 1, "size": 28} | wrong)
