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
        accuracy: mean accuracy over the episodes, a fraction.
        ci95: half the width of its 95% confidence interval, a fraction.
        episodes: number of episodes.
        tied: queries, over all episodes, for which several classes share the largest logit.
    """

    accuracy: float
    ci95: float
    episodes: int
    tied: int = 0


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Mark the classes with the largest logit of each query: bool ``[..., way]``; several may be true."""
    return logits == logits.amax(-1, keepdim=True)


def credit(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Credit each query: 1 if only its class has the largest logit, 1/n if it shares it with n - 1 others, else 0.

    This is the expected credit of a guess among equal logits. Taking the first of them would give constant embeddings
    an accuracy that depends on the order of the classes.

    Args:
        logits: ``[..., queries, way]``.
        labels: int64 ``[..., queries]``.

    Returns:
        float32 ``[..., queries]``.
    """
    best = largest(logits)
    return best.gather(-1, labels[..., None])[..., 0] / best.sum(-1)


TRAINED = "lower optimizer.lr or method.inner_learning_rate and train again, or choose a different hardware.precision"


class EpisodeAccuracy(Metric):
    """Mean accuracy over episodes with equal numbers of queries, with a 95% confidence interval.

    The interval is the normal one over episodes, 1.96 s / sqrt(n) with s the sample standard deviation, as few-shot
    papers report it. Equal logits share the credit, see ``credit``. Only integer counts are summed, so the estimate is
    the same to the last bit however the episodes are ordered and distributed over processes.

    Args:
        advice: what to do if logits are not finite.
    """

    full_state_update = False
    right: torch.Tensor
    right_squared: torch.Tensor
    episodes: torch.Tensor
    queries: torch.Tensor
    tied: torch.Tensor
    not_finite: torch.Tensor

    def __init__(self, advice: str = TRAINED) -> None:
        super().__init__()
        self.advice = advice
        for state in ("right", "right_squared", "episodes", "queries", "tied", "not_finite"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add some episodes.

        Args:
            logits: ``[episodes, queries, way]``.
            labels: int64 ``[episodes, queries]``.
        """
        best = largest(logits)
        sharing = best.sum(-1)
        right = best.gather(-1, labels[..., None])
        # Right queries of each episode by the number of classes that share the credit, [episodes, way].
        sizes = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
        counts = (right & (sharing[..., None] == sizes)).sum(1)
        self.right = self.right + counts.sum(0)
        self.right_squared = self.right_squared + (counts[:, :, None] * counts[:, None]).sum(0)
        self.episodes += len(labels)
        self.queries += labels.numel()
        self.tied += (sharing > 1).sum()
        self.not_finite += (~logits.isfinite()).any(-1).sum()

    def compute(self) -> Estimate:
        """Return the estimate over all episodes since the last reset.

        Raises:
            FewShotError: a logit is not finite.
        """
        n, queries = int(self.episodes), int(self.queries)
        if self.not_finite:
            raise FewShotError(
                f"the logits of {int(self.not_finite):,} of {queries:,} queries are not finite, so no accuracy can be "
                f"measured; {self.advice}"
            )
        shares = [Fraction(1, size) for size in range(1, len(self.right) + 1)]
        total = sum((count * share for count, share in zip(self.right.tolist(), shares, strict=True)), Fraction())
        squares = sum(
            (self.right_squared[i, j].item() * shares[i] * shares[j] for i, j in self.right_squared.nonzero().tolist()),
            Fraction(),
        )
        per_episode = queries / n
        # Sample variance of the credits, exact up to the conversion to float.
        variance = float((n * squares - total * total) / (n * (n - 1))) if n > 1 else float("nan")
        return Estimate(float(total / queries), 1.96 * variance**0.5 / n**0.5 / per_episode, n, int(self.tied))


def paired_difference(correct: NDArray[np.float64], others: NDArray[np.float64], queries: int) -> Estimate:
    """Estimate the mean difference of two methods' accuracies on the same episodes, with its 95% confidence interval.

    Episodes differ in difficulty far more than good methods differ from each other. Pairing cancels the difficulty, so
    the interval is narrower than the intervals of the two accuracies suggest.

    Args:
        correct: number of correct predictions of one method in each episode, float64 ``[episodes]``.
        others: the same for the other method.
        queries: number of queries per episode.
    """
    difference = (correct - others) / queries
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    return Estimate(float(difference.mean()), 1.96 * spread / len(difference) ** 0.5, len(difference))


def count_correct(
    dataset: EpisodeDataset, predictions: Mapping[EpisodeNumber, NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Count the correct predictions in each episode, with fractions for ties as in ``credit``.

    Args:
        dataset: the episodes of a split.
        predictions: for each episode the classes with the largest logit of each query, bool ``[queries, way]``.

    Returns:
        float64 ``[episodes]``, in the order of ``predictions``.
    """
    given = np.stack(list(predictions.values()))
    if dataset.concentration is None:  # every episode has the same labels
        labels = np.broadcast_to(dataset.query_labels.numpy(), given.shape[:2])
    else:
        labels = np.stack([dataset[number].query_labels.numpy() for number in predictions])
    correct = np.take_along_axis(given, labels[..., None], axis=2)[..., 0]
    return np.asarray((correct / given.sum(2)).sum(1), dtype=np.float64)


def confusion_counts(
    dataset: EpisodeDataset, predictions: Mapping[EpisodeNumber, NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Count how often two classes were in the same episode, and how often one was mistaken for the other.

    Args:
        dataset: the episodes of a split.
        predictions: see ``count_correct``; tied classes share one prediction.

    Returns:
        float64 ``[2, classes, classes]``, indexed by the class of a query and any class: the number of queries whose
        episode contained both, and the number of those predicted as the latter.
    """
    count = len(dataset.first)
    counts = np.zeros((2, count, count))
    for number, predicted in predictions.items():
        episode = dataset[number]
        classes = classes_of(episode, dataset.first)
        truth = classes[episode.query_labels.numpy()]
        np.add.at(counts[0], (truth[:, None], classes[None]), 1)
        np.add.at(counts[1], (truth[:, None], classes[None]), predicted / predicted.sum(1, keepdims=True))
    return counts
