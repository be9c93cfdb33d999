"""R2D2: a ridge regression solved in each episode (Bertinetto et al., 2019, arXiv 1805.08136)."""

import torch
from torch import nn

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.distances import l2
from fewshot.methods.base import MetricMethod


class R2D2(MetricMethod):
    """Regress one-hot labels on the support embeddings; the Woodbury form, with a matrix of the support's size."""

    def __init__(self, encoder: nn.Module, penalty: float) -> None:
        super().__init__(encoder, l2)
        self.penalty = nn.Parameter(torch.tensor(float(penalty)).log())
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Logits ``[queries, way]``: equation 6 of the paper."""
        support = embedded.support
        labels = nn.functional.one_hot(embedded.support_labels, embedded.way).to(support.dtype)
        gram = support @ support.T + self.penalty.exp() * torch.eye(len(support), device=support.device)
        return self.scale * (embedded.query @ support.T @ torch.linalg.solve(gram, labels)) + self.shift
