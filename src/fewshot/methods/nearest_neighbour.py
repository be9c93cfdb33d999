"""The nearest neighbour (Fix & Hodges, 1951), the baseline of Vinyals et al., 2016, arXiv 1606.04080."""

import torch

from fewshot.methods.training_free import TrainingFree, squared_distances


class NearestNeighbour(TrainingFree):
    """A query has the class of the nearest support sample.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
    """

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return minus the squared distance to the nearest sample of each class."""
        distances = squared_distances(query, support)[..., None]  # [tasks, queries, support samples, 1]
        return -distances.masked_fill(labels[:, None] == 0, torch.inf).amin(-2)
