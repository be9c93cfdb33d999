"""Distances between embeddings, each computed with one matrix product."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import normalize

from fewshot.checks import Positive
from fewshot.errors import FewShotError

# Maps [queries, features] and [points, features] to [queries, points].
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def l2(queries: torch.Tensor, points: torch.Tensor, scale: Positive = 1.0) -> torch.Tensor:
    """Squared Euclidean distance, the Bregman divergence of Snell et al. (arXiv 1703.05175, section 2.4).

    Args:
        queries: ``[queries, features]``.
        points: ``[points, features]``.
        scale: a positive factor. Distances between untrained embeddings differ by about the square root of the number
            of features times the factor; if that is far more than 1, training first shrinks the embeddings until all
            look alike.

    Returns:
        ``[queries, points]``; rounding can leave a distance of 0 slightly negative.

    Raises:
        FewShotError: ``scale`` is not positive.
    """
    _check_positive(scale)
    queries, points = _full_precision(queries, points)
    with torch.autocast(queries.device.type, enabled=False):
        squares = queries.square().sum(1)[:, None] + points.square().sum(1)
        return torch.addmm(squares, queries, points.T, alpha=-2 * scale, beta=scale)


def cosine(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Cosine distance, 1 - cos, between 0 and 2; a zero vector has distance 1 to everything.

    Args:
        queries: ``[queries, features]``.
        points: ``[points, features]``.

    Returns:
        ``[queries, points]``.
    """
    queries, points = _full_precision(queries, points)
    with torch.autocast(queries.device.type, enabled=False):
        return 1 - normalize(queries, dim=1) @ normalize(points, dim=1).T


class ScaledCosine(nn.Module):
    """Cosine distance times a factor, constant or learned.

    Without a factor, the softmax over ``way`` similarities in [-1, 1] cannot exceed e / (e + (way - 1) / e).

    Args:
        scale: the factor, positive; its initial value if it is learned.
        learn: learn the factor's logarithm, so that the factor stays positive.

    Raises:
        FewShotError: ``scale`` is not positive.
    """

    def __init__(self, scale: Positive, learn: bool) -> None:
        super().__init__()
        _check_positive(scale)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn)

    def forward(self, queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Compute the distances.

        Args:
            queries: ``[queries, features]``.
            points: ``[points, features]``.

        Returns:
            ``[queries, points]``, between 0 and twice the factor.
        """
        return self.log_scale.exp() * cosine(queries, points)


def _full_precision(queries: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Use at least float32: half precision would lose small distances between large vectors."""
    wide = torch.promote_types(torch.promote_types(queries.dtype, points.dtype), torch.float32)
    return queries.to(wide), points.to(wide)


def _check_positive(scale: float) -> None:
    if not scale > 0:
        raise FewShotError(f"distance.scale={scale} must be positive")
