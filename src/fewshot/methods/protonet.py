"""Prototypical networks (Snell, Swersky & Zemel, 2017, arXiv 1703.05175)."""

import torch

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.methods.base import MetricMethod


class PrototypicalNetwork(MetricMethod):
    """A class is the mean of its embedded support samples; a query belongs to the nearest.

    Args:
        encoder: the embedding function f of the paper.
        distance: d of the paper, from queries to prototypes.
    """

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Logits ``[queries, way]``: the softmax over them is equation 2."""
        return -self.distance(embedded.query, prototypes(embedded.support, embedded.support_labels, embedded.way))


def prototypes(support: torch.Tensor, labels: torch.Tensor, way: int) -> torch.Tensor:
    """The mean of each class's support embeddings: equation 1.

    Args:
        support: ``[support samples, features]``.
        labels: int64 ``[support samples]``, every class at least once; classes may differ in shot.
        way: the number of classes.

    Returns:
        ``[way, features]``.
    """
    # As one_hot, without its look at the labels, for which the host waits on some devices.
    members = (labels[:, None] == torch.arange(way, device=labels.device)).to(support.dtype)
    return (members / members.sum(0)).T @ support
