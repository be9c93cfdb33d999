"""Loaders: which batches a process takes, one after the other.

They are no PyTorch loaders with workers: an episode is drawn far quicker than it could be sent from one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from fewshot.data.episodes import EpisodeDataset, EpisodeNumber, Gather, MetaBatch, Share, stack

EVALUATED_TOGETHER = 20  # episodes of a process in a meta-batch of validation and test; changes no result
Batch = TypeVar("Batch")


class TrainingLoader(Generic[Batch]):
    """The batches of a stretch of the training; to iterate again goes on after it, and so repeats no episode.

    Args:
        trained: training episodes before the first stretch, over all processes.
        stretch: the training episodes from a number of them on to the next stop.
        plan: what this process takes of a stretch.
        make: a batch.
    """

    def __init__(
        self,
        trained: int,
        stretch: Callable[[int], range],
        plan: Callable[[range], Sequence[Share]],
        make: Callable[[Share], Batch],
    ) -> None:
        self.trained, self.stretch, self.plan, self.make = trained, stretch, plan, make

    def __iter__(self) -> Iterator[Batch]:
        for share in self.plan(self.stretch(self.trained)):
            self.trained = share.stop if share.completes else share.start
            yield self.make(share)

    def __len__(self) -> int:
        return len(self.plan(self.stretch(self.trained)))


class EvaluationLoader:
    """The episodes of a validation or test, by the meta-batch: always the same ones.

    Args:
        dataset: the episodes.
        episodes: how many, over all processes.
        images: where their images are.
        rank: this process, in ``0..processes-1``.
        processes: how many share out the episodes.
    """

    def __init__(
        self, dataset: EpisodeDataset, episodes: int, images: Gather, rank: int = 0, processes: int = 1
    ) -> None:
        self.dataset, self.episodes, self.images = dataset, episodes, images
        self._own = [EpisodeNumber(0, number) for number in range(rank, episodes, processes)]

    def __iter__(self) -> Iterator[MetaBatch]:
        for first in range(0, len(self._own), EVALUATED_TOGETHER):
            numbers = self._own[first : first + EVALUATED_TOGETHER]
            episodes = stack([self.dataset[number] for number in numbers])
            yield MetaBatch(episodes, Share(numbers), self.images)

    def __len__(self) -> int:
        return len(range(0, len(self._own), EVALUATED_TOGETHER))

    def positions(self) -> torch.Tensor:
        """The images that the episodes of all processes use: their positions in the bank, int64, ascending."""
        episodes = (self.dataset[EpisodeNumber(0, number)] for number in range(self.episodes))
        return torch.cat([torch.cat([episode.support, episode.query]) for episode in episodes]).unique()
