"""A small encoder."""

import torch
from torch import nn


class Rows(nn.Module):
    """One convolution; the embedding is the mean of its feature maps."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, stride=2)

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """``[images, filters, height, width]``."""
        return torch.relu(self.conv(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``[images, filters]``."""
        return self.feature_maps(images).mean((2, 3))
