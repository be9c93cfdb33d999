"""The residual encoder of the few-shot literature."""

import torch
from torch import nn
from torch.nn.functional import leaky_relu, max_pool2d
from torchvision.ops import DropBlock2d

from fewshot.checks import Count, Share, checked
from fewshot.errors import FewShotError

WIDTHS = (64, 160, 320, 640)
SLOPE = 0.1  # negative slope of the leaky ReLU
DROPPED = 5  # height and width of the squares that DropBlock drops, at most


class ResNet12(nn.Sequential):
    """Four residual blocks of three 3x3 convolutions, 64, 160, 320 and 640 wide, averaged over the image.

    As in Lee et al. (MetaOptNet, 2019, arXiv 1904.03758, section 4.1), after Oreshkin et al. (TADAM, 2018, arXiv
    1805.10123), but with the mean over the last maps as the embedding, as in most later work.

    Args:
        channels: of the images: 1 for grey, 3 for RGB.
        size: height and width of the images, in pixels, at least 16.
        drop: share of activations that DropBlock (Ghiasi et al., 2018, arXiv 1810.12890) drops in the last two blocks
            in training, in 5x5 squares (3x3 or 1x1 in maps that are smaller), constant over training; 0: none.

    Raises:
        FewShotError: the images are too small, or a number is out of range.

    Shape:
        float ``[images, channels, size, size]`` to ``[images, 640]``.
    """

    @checked("encoder")
    def __init__(self, channels: Count, size: int, drop: Share = 0.0) -> None:
        if size < 16:
            raise FewShotError(f"encoder=resnet12 needs dataset.size={size} of at least 16")
        drops = (0.0, 0.0, drop, drop)
        super().__init__(
            *map(_Block, (channels, *WIDTHS), WIDTHS, drops, (size // 2, size // 4, size // 8, size // 16)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.size, self.channels, self.features, self.maps = size, channels, WIDTHS[-1], WIDTHS[-1]
        self.to(memory_format=torch.channels_last)

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the maps before averaging: ``[images, 640, size // 16, size // 16]``."""
        for block in list(self)[: len(WIDTHS)]:
            images = block(images)
        return images


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, drop: float, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normed(inputs, width, 3),
            nn.LeakyReLU(SLOPE),
            *_normed(width, width, 3),
            nn.LeakyReLU(SLOPE),
            *_normed(width, width, 3),
        )
        self.shortcut = nn.Sequential(*_normed(inputs, width, 1))
        # Squares have a middle, so that their size is odd.
        self.drop = DropBlock2d(drop, min(DROPPED, size - 1 + size % 2)) if drop else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Leaky ReLU is monotonic, so pooling first computes the same function on a quarter of the values.
        pooled = max_pool2d(self.body(images) + self.shortcut(images), 2)
        return self.drop(leaky_relu(pooled, SLOPE))


def _normed(inputs: int, width: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, SLOPE, mode="fan_out")
    return convolution, nn.BatchNorm2d(width)
