"""Logistic regression on embeddings (Tian et al., 2020, arXiv 2003.11539), for all episodes at once."""

from typing import Literal

import torch
from torch import nn

from fewshot.checks import Positive, checked
from fewshot.methods.training_free import Features, TrainingFree
from fewshot.text import say

STEPS = 2000  # at most
TOLERANCE = 1e-5  # of the weights of embeddings of unit size, between two steps


class LogisticRegression(TrainingFree):
    """Multinomial logistic regression on the support, with the objective of scikit-learn's ``LogisticRegression``.

    Its own solvers take one episode at a time, and several times as long.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        inverse_penalty: C of scikit-learn: weight of the support's loss against the L2 penalty, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        inverse_penalty: Positive = 1.0,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.inverse_penalty = inverse_penalty
        self._warned = False

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the linear scores. Classes count the same whatever their shots."""
        # The optimal weights lie in the span of the support, so the fit needs only as many numbers as samples.
        basis = torch.linalg.qr(support.mT).Q  # [tasks, features, samples]
        inside, targets = (support @ basis).double(), labels.double()
        # Of unit size, so that the tolerance means the same for all embeddings; the penalty makes up for it.
        size = inside.norm(dim=2).mean(1).clamp_min(1e-12)
        points = _with_intercept(inside / size[:, None, None])
        way = targets.shape[2]
        counts = self.inverse_penalty * (targets / targets.sum(1, keepdim=True)).sum(2, keepdim=True)
        weighted = counts * (targets.shape[1] / way) * points
        # Two classes have a single vector of weights in scikit-learn, which counts twice here.
        penalty = (2.0 if way == 2 else 1.0) / size.square()[:, None].repeat(1, points.shape[2])
        penalty[:, -1] = 0  # the intercept is free
        # Boehning's bound of the Hessian (1992) makes each step lower the loss; Nesterov's momentum saves steps.
        bound = torch.linalg.inv(weighted.mT @ points / 2 + penalty.diag_embed())
        weights = points.new_zeros(len(points), points.shape[2], way)
        ahead, before = weights, points.new_ones(len(points), 1, 1)
        done = torch.zeros_like(before, dtype=torch.bool)  # by task, so that none depends on the others
        for _ in range(STEPS):
            slope = weighted.mT @ ((points @ ahead).softmax(2) - targets) + penalty[..., None] * ahead
            moved = ahead - bound @ slope
            change = moved - weights
            # Momentum that points uphill starts again, in each task by itself (O'Donoghue & Candes, 2015).
            uphill = ((ahead - moved) * change).sum((1, 2), keepdim=True) > 0
            now = torch.where(uphill, 1.0, (1 + (1 + 4 * before.square()).sqrt()) / 2)
            ahead = moved + torch.where(uphill, 0.0, (before - 1) / now) * change
            weights, before = torch.where(done, weights, moved), now
            done = done | (change.abs().amax((1, 2), keepdim=True) < TOLERANCE)
            if done.all():
                break
        if not done.all() and not self._warned:
            self._warned = True
            say(
                f"warning: method=logistic_regression stopped after {STEPS:,} steps, before its optimum: lower "
                f"method.inverse_penalty={self.inverse_penalty:g}, or choose method.features=l2n",
                error=True,
            )
        return (_with_intercept((query @ basis).double() / size[:, None, None]) @ weights).to(query)


def _with_intercept(points: torch.Tensor) -> torch.Tensor:
    return torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
