"""Logistic regression on embeddings (Tian et al., 2020, arXiv 2003.11539), by scikit-learn."""

from typing import Literal

import torch
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression
from torch import nn

from fewshot.methods.training_free import Features, TrainingFree, check_positive


class LogisticRegression(TrainingFree):
    """Multinomial logistic regression, fitted to the support of each episode with scikit-learn.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        inverse_penalty: C of scikit-learn: weight of the support's loss against the L2 penalty, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        inverse_penalty: float = 1.0,
    ) -> None:
        super().__init__(encoder, features, centre)
        check_positive(inverse_penalty=inverse_penalty)
        self.inverse_penalty = inverse_penalty

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the linear scores. Classes count the same whatever their shots."""
        # The optimal weights lie in the span of the support, so the fit needs only as many numbers as samples.
        basis, coordinates = torch.linalg.qr(support.mT)  # [tasks, features, samples], [tasks, samples, samples]
        solutions = [
            self._fit(*task)
            for task in zip(coordinates.mT.double(), labels.argmax(-1), (query @ basis).double(), strict=True)
        ]
        return torch.stack(solutions).to(query)

    def _fit(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        model = SklearnLogisticRegression(C=self.inverse_penalty, class_weight="balanced", max_iter=1000)
        scores = model.fit(support.cpu(), labels.cpu()).decision_function(query.cpu())
        if scores.ndim == 1:  # two classes: one score, for the second
            scores = scores[:, None] * [-0.5, 0.5]
        return torch.from_numpy(scores)
