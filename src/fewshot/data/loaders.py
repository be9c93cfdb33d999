"""Loaders: the sequence of batches of a process.

They have no worker processes: an episode is drawn much faster than a worker could send it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from fewshot.data.episodes import EpisodeDataset, EpisodeNumber, Gather, MetaBatch, Share, stack

EVALUATED_TOGETHER = 20  # episodes per process and meta-batch of validation and test; does not affect results
NEARLY_ALL = 0.9  # of the images of a split
Batch = TypeVar("Batch")


class TrainingLoader(Generic[Batch]):
    """The batches of a stretch of the training; iterating again continues after it, so that no episode is repeated.

    Args:
        trained: training episodes before the first stretch, over all processes.
        stretch: returns the training episodes after a given number up to the next stop.
        plan: returns the shares of this process in a stretch.
        make: makes a batch of a share.
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
    """The episodes of a validation or test, in meta-batches: always the same ones.

    Args:
        dataset: the episodes.
        episodes: the number of episodes over all processes.
        images: loads images by position.
        rank: this process, in ``0..processes-1``.
        processes: the number of processes.
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
        """Return the positions of the images in the episodes of all processes, int64, ascending.

        If nearly all images of the split are among them, return all, so that kept embeddings serve other tasks, too.
        """
        episodes = (self.dataset[EpisodeNumber(0, number)] for number in range(self.episodes))
        drawn = torch.cat([torch.cat([episode.support, episode.query]) for episode in episodes]).unique()
        whole, _ = self.dataset.bank.labelled(self.dataset.split)
        return whole if len(drawn) >= NEARLY_ALL * len(whole) else drawn
