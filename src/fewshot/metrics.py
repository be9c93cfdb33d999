"""Accuracy over episodes, with its confidence interval."""

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

from fewshot.data.episodes import EpisodeDataset, EpisodeNumber, classes_of
from fewshot.errors import FewShotError


class Estimate(NamedTuple):
    """A mean over episodes.

    Attributes:
        accuracy: the mean of the episodes' accuracies, a fraction.
        ci95: half the width of its 95% confidence interval, a fraction.
        episodes: how many.
        tied: queries whose largest logit several classes share, over all episodes.
    """

    accuracy: float
    ci95: float
    episodes: int
    tied: int = 0


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Which classes have the largest logit of a query: bool ``[..., way]``, of which several may be true."""
    return logits == logits.amax(-1, keepdim=True)


def credit(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What each query counts: 1 where its class alone has the largest logit, 1/n where it shares it with n - 1 others.

    That is what a guess among equal logits is expected to count. To take the first of them would give constant
    embeddings an accuracy that depends on the order of the classes.

    Args:
        logits: ``[..., queries, way]``.
        labels: int64 ``[..., queries]``.

    Returns:
        float32 ``[..., queries]``.
    """
    first = largest(logits)
    return first.gather(-1, labels[..., None])[..., 0] / first.sum(-1)


class EpisodeAccuracy(Metric):
    """Mean accuracy of episodes that all have the same number of queries, with a 95% confidence interval.

    The interval is the normal one over episodes, 1.96 s / sqrt(n) with s the sample standard deviation, as few-shot
    papers report it. Equal logits share the credit, see ``credit``. Only counts are summed, so however the episodes are
    spread over processes, and in whatever order, the estimate is the same to the last bit.
    """

    full_state_update = False
    right: torch.Tensor
    right_squared: torch.Tensor
    episodes: torch.Tensor
    queries: torch.Tensor
    tied: torch.Tensor
    not_finite: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("right", "right_squared", "episodes", "queries", "tied", "not_finite"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count some episodes.

        Args:
            logits: ``[episodes, queries, way]``.
            labels: int64 ``[episodes, queries]``.
        """
        first = largest(logits)
        sharing = first.sum(-1)
        right = first.gather(-1, labels[..., None])
        # Of each episode the right queries by the number of classes that share the credit, [episodes, way].
        sizes = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
        counts = (right & (sharing[..., None] == sizes)).sum(1)
        self.right = self.right + counts.sum(0)
        self.right_squared = self.right_squared + (counts[:, :, None] * counts[:, None]).sum(0)
        self.episodes += len(labels)
        self.queries += labels.numel()
        self.tied += (sharing > 1).sum()
        self.not_finite += (~logits.isfinite()).any(-1).sum()

    def compute(self) -> Estimate:
        """The estimate over all episodes counted since the last reset.

        Raises:
            FewShotError: a logit is not finite.
        """
        n, queries = int(self.episodes), int(self.queries)
        if self.not_finite:
            raise FewShotError(
                f"the logits of {int(self.not_finite):,} of {queries:,} queries are not finite, so no accuracy can be "
                "measured; lower optimizer.lr or method.inner_learning_rate and train anew, or choose another "
                "hardware.precision"
            )
        shares = [Fraction(1, size) for size in range(1, len(self.right) + 1)]
        total = sum((count * share for count, share in zip(self.right.tolist(), shares, strict=True)), Fraction())
        squares = sum(
            (self.right_squared[i, j].item() * shares[i] * shares[j] for i, j in self.right_squared.nonzero().tolist()),
            Fraction(),
        )
        per_episode = queries / n
        # The sample variance of the credits, exact until this is a float.
        variance = float((n * squares - total * total) / (n * (n - 1))) if n > 1 else float("nan")
        return Estimate(float(total / queries), 1.96 * variance**0.5 / n**0.5 / per_episode, n, int(self.tied))


def paired_difference(right: NDArray[np.float64], others: NDArray[np.float64], queries: int) -> Estimate:
    """The mean difference of two methods' accuracies on the same episodes, with its 95% confidence interval.

    Episodes differ in difficulty far more than good methods do, and what they share falls out of a difference: its
    interval is narrower than those of the two accuracies would make believe.

    Args:
        right: the right answers of one method in each episode, float64 ``[episodes]``.
        others: those of the other.
        queries: of each episode.
    """
    difference = (right - others) / queries
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    return Estimate(float(difference.mean()), 1.96 * spread / len(difference) ** 0.5, len(difference))


def meetings_of(dataset: EpisodeDataset, answers: Mapping[EpisodeNumber, NDArray[np.bool_]]) -> NDArray[np.float64]:
    """How often classes met, and were taken for each other.

    Args:
        dataset: the episodes of a split.
        answers: for each episode the answer to each query, bool ``[queries, way]``; several that are equal share one.

    Returns:
        float64 ``[2, classes, classes]``: for the class of a query and another one the times that both were in the
        episode, and the times that the other one was the answer.
    """
    count = len(dataset.first)
    meetings = np.zeros((2, count, count))
    for number, given in answers.items():
        episode = dataset[number]
        classes = classes_of(episode, dataset.first)
        truth = classes[episode.query_labels.numpy()]
        np.add.at(meetings[0], (truth[:, None], classes[None]), 1)
        np.add.at(meetings[1], (truth[:, None], classes[None]), given / given.sum(1, keepdims=True))
    return meetings
