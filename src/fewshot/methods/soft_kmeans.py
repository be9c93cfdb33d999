"""Prototypes refined by soft k-means (Ren et al., 2018, arXiv 1803.00676), with the queries as unlabelled examples."""

from typing import Literal

import torch
from torch import nn

from fewshot.checks import Count, Positive, checked
from fewshot.methods.training_free import Features, TrainingFree, prototypes, squared_distances


class SoftKMeans(TrainingFree):
    """Move the prototypes towards the queries that are near to them.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        steps: refinements, at least 1; the paper uses one.
        scale: factor of the squared distances in the softmax, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    transductive = True

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        steps: Count = 1,
        scale: Positive = 10.0,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.steps, self.scale = steps, scale

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the logits of the refined prototypes: equation 3, then 1."""
        centres = prototypes(support, labels)
        for _ in range(self.steps):
            assigned = (-self.scale * squared_distances(query, centres)).softmax(-1)
            total = (labels.sum(1) + assigned.sum(1))[..., None]
            centres = (labels.mT @ support + assigned.mT @ query) / total
        return -self.scale * squared_distances(query, centres)
