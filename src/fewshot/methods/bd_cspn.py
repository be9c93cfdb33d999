"""BD-CSPN: prototypes with diminished bias (Liu, Song & Qin, 2020, arXiv 1911.10713)."""

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import one_hot

from fewshot.checks import Positive, checked
from fewshot.methods.training_free import Features, TrainingFree, cosines, prototypes


class BDCSPN(TrainingFree):
    """Shift the queries onto the support, and move each prototype by the samples that are nearest to it.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        scale: epsilon of the paper, a factor of the cosines, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    transductive = True

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "none",
        centre: Literal["train", "support"] = "train",
        scale: Positive = 10.0,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.scale = scale

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the scaled cosines with the rectified prototypes."""
        centres, query = rectify(support, labels, query, self.scale)
        return self.scale * cosines(query, centres)


def rectify(
    support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diminish both biases of prototypes (sections 3.2 and 3.3 of the paper).

    Args:
        support: ``[tasks, support samples, features]``.
        labels: one-hot, ``[tasks, support samples, way]``.
        query: ``[tasks, queries, features]``.
        scale: factor of the cosines in the softmax over a class's samples.

    Returns:
        The rectified prototypes, ``[tasks, way, features]``, and the shifted queries.
    """
    # Cross-class bias: the means of support and queries should be the same.
    query = query + support.mean(1, keepdim=True) - query.mean(1, keepdim=True)
    # Intra-class bias: each query has the label of its nearest prototype, and a weight by its cosine with it.
    centres = prototypes(support, labels)
    similar = cosines(torch.cat([support, query], dim=1), centres)
    nearest = one_hot(similar[:, support.shape[1] :].argmax(-1), labels.shape[-1]).to(labels)
    members = torch.cat([labels, nearest], dim=1)
    weights = (scale * similar).masked_fill(members == 0, -torch.inf).softmax(1)
    return weights.mT @ torch.cat([support, query], dim=1), query
