"""Prototypical networks (Snell, Swersky & Zemel, 2017, arXiv 1703.05175)."""

import torch

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.methods.base import MetricMethod


class PrototypicalNetwork(MetricMethod):
    """Represent each class by the mean of its embedded support samples; assign queries to the nearest.

    Args:
        encoder: the embedding function f of the paper.
        distance: d of the paper, from queries to prototypes.
    """

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Return logits ``[queries, way]``, whose softmax is equation 2."""
        return -self.distance(embedded.query, prototypes(embedded.support, embedded.support_labels, embedded.way))


def prototypes(support: torch.Tensor, labels: torch.Tensor, way: int) -> torch.Tensor:
    """Average the support embeddings of each class: equation 1.

    Args:
        support: ``[support samples, features]``.
        labels: int64 ``[support samples]``, every class at least once; classes may differ in shot.
        way: the number of classes.

    Returns:
        ``[way, features]``.
    """
    # Like one_hot, but without reading the labels, which synchronises with some devices.
    members = (labels[:, None] == torch.arange(way, device=labels.device)).to(support.dtype)
    return (members / members.sum(0)).T @ support
