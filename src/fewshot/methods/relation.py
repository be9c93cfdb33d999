"""Relation networks (Sung et al., 2018, arXiv 1711.06025)."""

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from fewshot.checks import Count, checked
from fewshot.data.episodes import EmbeddedEpisode
from fewshot.encoders import feature_maps
from fewshot.errors import FewShotError
from fewshot.methods.base import MetricMethod
from fewshot.methods.protonet import prototypes


class RelationNetwork(MetricMethod):
    """A small network scores how well the feature maps of a query fit those of each class.

    The maps of a class are the mean over its support samples, so that shots may differ; the paper takes the sum.

    Args:
        encoder: f of the paper, with feature maps and their number, ``maps``.
        filters: of both convolutions of the relation module g, at least 1.
        hidden: width of the layer before the score, at least 1.
        objective: "mse": the squared error of the sigmoid of each score, equation 2; "cross_entropy": over the classes.

    Raises:
        FewShotError: a setting is out of range, or the encoder does not say how many maps it has.
    """

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        filters: Count = 64,
        hidden: Count = 8,
        objective: Literal["mse", "cross_entropy"] = "mse",
    ) -> None:
        super().__init__(encoder)
        maps = getattr(encoder, "maps", None)
        if maps is None:
            raise FewShotError(
                f"method=relation needs the number of feature maps, and the encoder {type(encoder).__name__} has no "
                "attribute maps; choose encoder=conv4, resnet12, pretrained or timm"
            )
        self.objective = objective
        self.relation = nn.Sequential(
            *_block(2 * maps, filters),
            *_block(filters, filters),
            nn.AdaptiveMaxPool2d(1),  # the paper flattens, which needs images of one size
            nn.Flatten(),
            nn.Linear(filters, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return the feature maps ``[images, maps, height, width]``."""
        return feature_maps(self.encoder, images)

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Return logits ``[queries, way]``, whose sigmoids are the relation scores r of equation 1."""
        shape = embedded.query.shape[1:]
        classes = prototypes(embedded.support.flatten(1), embedded.support_labels, embedded.way).unflatten(1, shape)
        pairs = torch.cat(torch.broadcast_tensors(classes[None], embedded.query[:, None]), dim=2)
        scores: torch.Tensor = self.relation(pairs.flatten(0, 1))
        return scores.view(-1, embedded.way)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See ``MetricMethod``."""
        if self.objective == "cross_entropy":
            return cross_entropy(logits, labels)
        return mse_loss(logits.sigmoid(), one_hot(labels, logits.shape[1]).to(logits.dtype))


def _block(channels: int, filters: int) -> tuple[nn.Module, ...]:
    # With ceil_mode, maps of one pixel, such as Conv4's of 28x28 images, can be pooled, too.
    return (
        nn.Conv2d(channels, filters, kernel_size=3, padding=1),
        nn.BatchNorm2d(filters),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
    )
