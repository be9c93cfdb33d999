"""Accuracy over episodes, with its confidence interval."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

from fewshot.data.episodes import EpisodeDataset, EpisodeNumber, classes_of


class Estimate(NamedTuple):
    """A mean over episodes.

    Attributes:
        accuracy: the mean of the episodes' accuracies, a fraction.
        ci95: half the width of its 95% confidence interval, a fraction.
        episodes: how many.
    """

    accuracy: float
    ci95: float
    episodes: int


class EpisodeAccuracy(Metric):
    """Mean accuracy of episodes that all have the same number of queries, with a 95% confidence interval.

    The interval is the normal one over episodes, 1.96 s / sqrt(n) with s the sample standard deviation, as few-shot
    papers report it. Only counts are summed, so however the episodes are spread over processes, and in whatever
    order, the estimate is the same to the last bit.
    """

    full_state_update = False
    right: torch.Tensor
    right_squared: torch.Tensor
    episodes: torch.Tensor
    queries: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("right", "right_squared", "episodes", "queries"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count some episodes.

        Args:
            logits: ``[episodes, queries, way]``.
            labels: int64 ``[episodes, queries]``.
        """
        right = (logits.argmax(2) == labels).sum(1)
        self.right += right.sum()
        self.right_squared += right.square().sum()
        self.episodes += len(labels)
        self.queries += labels.numel()

    def compute(self) -> Estimate:
        """The estimate over all episodes counted since the last reset."""
        right, squared = int(self.right), int(self.right_squared)
        n, queries = int(self.episodes), int(self.queries)
        per_episode = queries / n
        # The sample variance of the counts, exact until this one division.
        variance = (n * squared - right * right) / (n * (n - 1)) if n > 1 else float("nan")
        return Estimate(right / queries, 1.96 * variance**0.5 / n**0.5 / per_episode, n)


def paired_difference(right: NDArray[np.int64], others: NDArray[np.int64], queries: int) -> Estimate:
    """The mean difference of two methods' accuracies on the same episodes, with its 95% confidence interval.

    Episodes differ in difficulty far more than good methods do, and what they share falls out of a difference: its
    interval is narrower than those of the two accuracies would make believe.

    Args:
        right: the right answers of one method in each episode, int64 ``[episodes]``.
        others: those of the other.
        queries: of each episode.
    """
    difference = (right - others) / queries
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    return Estimate(float(difference.mean()), 1.96 * spread / len(difference) ** 0.5, len(difference))


def meetings_of(dataset: EpisodeDataset, answers: Mapping[EpisodeNumber, NDArray[np.int64]]) -> NDArray[np.int64]:
    """How often classes met, and were taken for each other.

    Args:
        dataset: the episodes of a split.
        answers: for each episode the label given to each query, int64 ``[queries]``.

    Returns:
        int64 ``[2, classes, classes]``: for the class of a query and another one the times that both were in the
        episode, and the times that the other one was the answer.
    """
    count = len(dataset.first)
    meetings = np.zeros((2, count, count), dtype=np.int64)
    for number, given in answers.items():
        episode = dataset[number]
        classes = classes_of(episode, dataset.first)
        truth = classes[episode.query_labels.numpy()]
        np.add.at(meetings[0], (truth[:, None], classes[None]), 1)
        np.add.at(meetings[1], (truth, classes[given]), 1)
    return meetings
