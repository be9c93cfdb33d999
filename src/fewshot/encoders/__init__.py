"""Encoders: networks from images to embeddings.

An encoder is any module that maps images, float ``[images, channels, height, width]``, to embeddings
``[images, features]``. Optional attributes:

- ``features``: the length of an embedding, for methods that add layers after the encoder;
- ``maps``: the number of feature maps, for methods that add layers after those;
- ``feature_maps``: maps images to ``[images, channels, height, width]``, for methods that compare regions of images;
- ``WITHOUT_WEIGHTS``: arguments that skip reading and downloading weights, used when others are loaded afterwards;
- ``size``, ``channels`` and ``normalise``: the expected image format, for predictions without a data set.
"""

import torch
from torch import nn

from fewshot.errors import FewShotError


def features_of(encoder: nn.Module) -> int:
    """Return the length of an encoder's embeddings, for a layer after it.

    Raises:
        FewShotError: the encoder does not state it.
    """
    features = getattr(encoder, "features", None)
    if features is None:
        raise FewShotError(
            f"the method needs the length of embeddings, and the encoder {type(encoder).__name__} has no attribute "
            "features; add it, or choose encoder=conv4, resnet12, pretrained or timm"
        )
    return int(features)


def feature_maps(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the feature maps from which an encoder computes its embeddings.

    Args:
        encoder: see the module's docstring.
        images: float ``[images, channels, height, width]``.

    Returns:
        ``[images, maps, height, width]``, with the height and width of the encoder's last maps.

    Raises:
        FewShotError: the encoder has no feature maps.
    """
    if not hasattr(encoder, "feature_maps"):
        raise FewShotError(
            f"the encoder {type(encoder).__name__} has no feature maps; choose encoder=conv4, resnet12, pretrained or "
            "timm, or give it a method feature_maps(images)"
        )
    maps: torch.Tensor = encoder.feature_maps(images)  # type: ignore[operator]
    return maps
