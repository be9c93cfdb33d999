"""Relation networks (Sung et al., 2018, arXiv 1711.06025)."""

import torch
from torch import nn

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.distances import l2
from fewshot.encoders import feature_maps
from fewshot.methods.base import MetricMethod
from fewshot.methods.protonet import prototypes


class RelationNetwork(MetricMethod):
    """A small network says how much the feature maps of a query and of a class have in common."""

    def __init__(self, encoder: nn.Module, channels: int, filters: int) -> None:
        super().__init__(encoder, l2)
        self.relation = nn.Sequential(
            nn.Conv2d(2 * channels, filters, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, 1)
        )

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Feature maps ``[images, channels, height, width]``."""
        return feature_maps(self.encoder, images)

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Logits ``[queries, way]``: the relation scores, trained by cross-entropy."""
        shape = embedded.query.shape[1:]
        classes = prototypes(embedded.support.flatten(1), embedded.support_labels, embedded.way).unflatten(1, shape)
        pairs = torch.cat(torch.broadcast_tensors(embedded.query[:, None], classes[None]), dim=2)
        scores: torch.Tensor = self.relation(pairs.flatten(0, 1))
        return scores.view(-1, embedded.way)
