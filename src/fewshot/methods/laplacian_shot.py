"""LaplacianShot (Ziko, Dolz, Granger & Ben Ayed, 2020, arXiv 2006.15486)."""

from typing import Literal

import torch
from torch import nn

from fewshot.checks import Count, Positive, checked
from fewshot.methods.bd_cspn import rectify
from fewshot.methods.training_free import Features, TrainingFree, prototypes, squared_distances


class LaplacianShot(TrainingFree):
    """Assign queries to near prototypes, and near queries to the same class.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        neighbours: nearest queries that a query should agree with, at least 1 (k of the paper).
        weight: of that agreement, lambda of the paper, positive.
        steps: bound updates at most, at least 1.
        rectified: rectify the prototypes first, as in BD-CSPN.
        scale: factor of the cosines of that.

    Raises:
        FewShotError: a setting is out of range.
    """

    transductive = True

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "cl2n",
        centre: Literal["train", "support"] = "train",
        neighbours: Count = 2,
        weight: Positive = 0.7,
        steps: Count = 20,
        rectified: bool = True,
        scale: Positive = 10.0,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.neighbours, self.weight, self.steps = neighbours, weight, steps
        self.rectified, self.scale = rectified, scale

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the logits of algorithm 1; each step is equation 10."""
        centres = prototypes(support, labels)
        if self.rectified:
            centres, query = rectify(support, labels, query, self.scale)
        unary = squared_distances(query, centres)
        between = squared_distances(query, query)
        between.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        neighbours = between.topk(min(self.neighbours, query.shape[1] - 1), largest=False).indices
        tasks = torch.arange(len(query), device=query.device)[:, None, None]
        logits = -unary
        for _ in range(self.steps):
            logits = self.weight * logits.softmax(-1)[tasks, neighbours].sum(2) - unary
        return logits
