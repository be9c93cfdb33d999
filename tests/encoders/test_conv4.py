import pytest
import torch
from torch import nn

from fewshot.encoders import feature_maps
from fewshot.encoders.block import Block
from fewshot.encoders.conv4 import Conv4
from fewshot.errors import FewShotError


class Textbook(nn.Sequential):
    """The encoder as described in the papers: ReLU before pooling, channels first."""

    def __init__(self, channels: int, signed: bool = False) -> None:
        blocks = []
        for inputs in (channels, 64, 64, 64):
            blocks.append(
                nn.Sequential(nn.Conv2d(inputs, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
            )
        if signed:
            blocks[-1].pop(2)
        super().__init__(*blocks, nn.Flatten())


@pytest.mark.parametrize(
    ("channels", "size", "features", "signed"), [(1, 28, 64, False), (3, 84, 1600, False), (3, 32, 256, True)]
)
def test_output_and_gradients_match_the_papers(channels, size, features, signed):
    torch.manual_seed(0)
    ours, textbook = Conv4(channels, size, signed=signed).double(), Textbook(channels, signed).double()
    textbook.load_state_dict(ours.state_dict())
    images = torch.randn(6, channels, size, size, dtype=torch.float64)
    for training in (True, False):
        ours.train(training), textbook.train(training)
        embeddings = ours(images)
        assert embeddings.shape == (6, features) and ours.features == features
        expected = textbook(images)
        torch.testing.assert_close(embeddings, expected)
        weights = torch.randn_like(expected)
        got = torch.autograd.grad((embeddings * weights).sum(), ours.parameters())
        want = torch.autograd.grad((expected * weights).sum(), textbook.parameters())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_block_applies_an_activation_that_replaced_its_relu():
    torch.manual_seed(0)
    replaced = Block(1, 4)
    replaced[3] = nn.LeakyReLU(0.5)
    images = torch.randn(3, 1, 8, 8)
    expected = nn.Sequential(*replaced)(images)
    assert (expected < 0).any()
    torch.testing.assert_close(replaced(images), expected)


def test_number_of_parameters():
    assert sum(p.numel() for p in Conv4(1, 28).parameters()) == 111_936


def test_feature_maps_flatten_to_the_embedding():
    encoder, images = Conv4(3, 84).eval(), torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        maps = feature_maps(encoder, images)
        torch.testing.assert_close(maps.flatten(1), encoder(images))
    assert maps.shape == (2, 64, 5, 5)


@pytest.mark.parametrize("wrong", [{"size": 15}, {"channels": 0}, {"filters": 0}])
def test_invalid_settings_are_rejected(wrong):
    with pytest.raises(FewShotError, match=f"{next(iter(wrong))}="):
        Conv4(**{"channels": 1, "size": 28} | wrong)
