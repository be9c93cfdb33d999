"""Distances between embeddings, each computed by one matrix product."""

import torch
from torch.nn.functional import normalize


def l2(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distance, the Bregman divergence of Snell et al. (arXiv 1703.05175, section 2.4).

    Args:
        queries: ``[queries, features]``.
        points: ``[points, features]``.

    Returns:
        ``[queries, points]``; rounding can leave a distance of 0 slightly negative.
    """
    queries, points = _full_precision(queries, points)
    with torch.autocast(queries.device.type, enabled=False):
        squares = queries.square().sum(1)[:, None] + points.square().sum(1)
        return torch.addmm(squares, queries, points.T, alpha=-2)


def cosine(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Cosine distance, 1 - cos, between 0 and 2; a zero vector is at distance 1 from everything.

    Args:
        queries: ``[queries, features]``.
        points: ``[points, features]``.

    Returns:
        ``[queries, points]``.
    """
    queries, points = _full_precision(queries, points)
    with torch.autocast(queries.device.type, enabled=False):
        return 1 - normalize(queries, dim=1) @ normalize(points, dim=1).T


def _full_precision(queries: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half precision would lose small distances between large vectors."""
    wide = torch.promote_types(torch.promote_types(queries.dtype, points.dtype), torch.float32)
    return queries.to(wide), points.to(wide)
