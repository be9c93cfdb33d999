"""R2D2: ridge regression on trained embeddings (Bertinetto et al., 2019, arXiv 1805.08136)."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from fewshot.checks import Positive, Share, checked
from fewshot.data.episodes import EmbeddedEpisode
from fewshot.methods.base import MetricMethod


class R2D2(MetricMethod):
    """Regress one-hot labels on the support embeddings; the encoder learns through the closed-form solution.

    With a constant penalty it is the ridge variant of MetaOptNet (Lee et al., 2019, arXiv 1904.03758), which has no
    intercept. Here an intercept is penalised like the weights, as in the code of R2D2's authors.

    Args:
        encoder: the feature extractor of the paper.
        penalty: factor of the squared norm of the weights, lambda of the paper, positive.
        learn_penalty: learn the penalty's logarithm, starting from ``penalty``.
        scale: initial factor of the predictions, alpha of the paper, positive; it is learned.
        label_smoothing: share of the target spread evenly over all classes, at least 0 and below 1.

    Raises:
        FewShotError: a setting is out of range.
    """

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        penalty: Positive = 1.0,
        learn_penalty: bool = True,
        scale: Positive = 10.0,
        label_smoothing: Share = 0.0,
    ) -> None:
        super().__init__(encoder)
        self.label_smoothing = label_smoothing
        self.log_penalty = nn.Parameter(torch.tensor(penalty).log(), requires_grad=learn_penalty)
        self.scale, self.shift = nn.Parameter(torch.tensor(float(scale))), nn.Parameter(torch.zeros(()))

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Return logits ``[queries, way]``: the predicted labels, scaled and shifted.

        The Woodbury identity gives a system of the support's size, not of the features'. Samples are weighted so that
        classes count the same whatever their shots.
        """
        with torch.autocast(embedded.query.device.type, enabled=False):
            wide = torch.promote_types(embedded.query.dtype, torch.float32)
            support, query = embedded.support.to(wide), embedded.query.to(wide)
            labels = one_hot(embedded.support_labels, embedded.way).to(wide)
            weights = (labels @ (len(labels) / embedded.way / labels.sum(0))).sqrt()[:, None]
            # A constant feature of 1, for the intercept, adds 1 to each product.
            gram = (support @ support.T + 1) * (weights @ weights.T)
            gram = gram + self.log_penalty.exp() * torch.eye(len(gram), dtype=wide, device=gram.device)
            products = (query @ support.T + 1) * weights.T
            # ``solve`` would make the host wait for a GPU, to check that it succeeded.
            solution = torch.linalg.solve_ex(gram, weights * labels).result
            return self.scale * products @ solution + self.shift

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See ``MetricMethod``."""
        return cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
