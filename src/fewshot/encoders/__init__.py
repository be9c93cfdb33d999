"""Encoders: networks from images to embeddings.

To a method an encoder is any module that turns images, float ``[images, channels, height, width]``, into embeddings
``[images, features]``. What else it may have, and who asks for it:

- ``features``: the length of an embedding, for methods with layers of their own behind the encoder;
- ``feature_maps``: images to maps ``[images, channels, height, width]``, for methods that compare places in images;
- ``WITHOUT_WEIGHTS``: arguments that make it without reading or downloading weights, for whoever brings others;
- ``size``, ``channels`` and ``normalise``: the images that it takes, for predictions without a data set.
"""

import torch
from torch import nn

from fewshot.errors import FewShotError


def feature_maps(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The maps that an encoder makes its embeddings from.

    Args:
        encoder: see above.
        images: float ``[images, channels, height, width]``.

    Returns:
        ``[images, maps, height, width]``, of the height and width that the encoder ends with.

    Raises:
        FewShotError: it has none.
    """
    if not hasattr(encoder, "feature_maps"):
        raise FewShotError(
            f"the encoder {type(encoder).__name__} has no feature maps; choose encoder=conv4, resnet12, pretrained or "
            "timm, or give it a method feature_maps(images)"
        )
    maps: torch.Tensor = encoder.feature_maps(images)  # type: ignore[operator]
    return maps
