"""Ridge regression on embeddings: the solver of R2D2 (Bertinetto et al., 2019, arXiv 1805.08136), untrained."""

from typing import Literal

import torch
from torch import nn

from fewshot.checks import Positive, checked
from fewshot.methods.training_free import Features, TrainingFree


class RidgeRegression(TrainingFree):
    """Regress one-hot labels on the support, and take the largest answer.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        penalty: factor of the squared norm of the weights, lambda of the paper, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        penalty: Positive = 1.0,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.penalty = penalty

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the predicted labels, by equation 4: a system of the support's size, not of the features'.

        Samples are weighted so that classes count the same whatever their shots. There is an intercept, which the
        penalty spares.
        """
        samples = labels.shape[1]
        weights = (labels * (samples / labels.sum(1, keepdim=True) / labels.shape[2])).sum(-1, keepdim=True)
        centre, share = (weights * support).mean(1, keepdim=True), (weights * labels).mean(1, keepdim=True)
        points, targets = weights.sqrt() * (support - centre), weights.sqrt() * (labels - share)
        gram = points @ points.mT + self.penalty * torch.eye(samples, dtype=support.dtype, device=support.device)
        return (query - centre) @ points.mT @ torch.linalg.solve(gram, targets) + share
