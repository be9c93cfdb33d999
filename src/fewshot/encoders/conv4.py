"""The four-block convolutional encoder that all three papers share."""

from typing import Literal

import torch
from torch import nn

from fewshot.checks import Count, checked
from fewshot.encoders.block import Block
from fewshot.errors import FewShotError

POOLS = {"max": nn.AdaptiveMaxPool2d, "mean": nn.AdaptiveAvgPool2d}


class Conv4(nn.Sequential):
    """Four blocks of 3x3 convolution, batch norm, max pooling and ReLU, flattened.

    From Vinyals et al. (arXiv 1606.04080, section 4.1.1). The papers pool after the ReLU; since ReLU is monotonic,
    pooling first computes the same function on a quarter of the values.

    Args:
        channels: of the images: 1 for grey, 3 for RGB.
        size: height and width of the images, in pixels, at least 16.
        filters: number of filters of each convolution.
        pool: "none": the embedding is the last maps, flattened, as in the three papers; "max" or "mean": of each map,
            which gives ``filters`` features, as in FEAT (arXiv 1812.03664).
        signed: leave out the last ReLU, so that cosines can be negative (Gidaris & Komodakis, 2018, arXiv 1804.09458).

    Raises:
        FewShotError: the images are too small, a number is not positive, or the pooling is unknown.

    Shape:
        float ``[images, channels, size, size]`` to ``[images, features]``.
    """

    @checked("encoder")
    def __init__(
        self,
        channels: Count,
        size: int,
        filters: Count = 64,
        pool: Literal["none", "max", "mean"] = "none",
        signed: bool = False,
    ) -> None:
        if size < 16:
            raise FewShotError(f"encoder=conv4 needs dataset.size={size} of at least 16")
        super().__init__(
            Block(channels, filters),
            Block(filters, filters),
            Block(filters, filters),
            Block(filters, filters, signed=signed),
            *([] if pool == "none" else [POOLS[pool](1)]),
            nn.Flatten(),
        )
        self.size, self.channels, self.maps = size, channels, filters
        self.features = filters * (size // 16) ** 2 if pool == "none" else filters
        self.to(memory_format=torch.channels_last)

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the maps before flattening: ``[images, filters, size // 16, size // 16]``."""
        for block in list(self)[:4]:
            images = block(images)
        return images
