"""Episodes: which classes and images each one holds is a function of its number alone.

Nothing is stored between episodes and no generator runs on, so an episode can be rebuilt from its number, a run
resumes where it stopped, the ranks of a distributed run never draw the same episode, and two methods are compared
on the very same test episodes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from fewshot.data.bank import SPLITS, ImageBank
from fewshot.errors import FewShotError


class Episode(NamedTuple):
    """One few-shot task: tell the classes of the queries from the support samples.

    Attributes:
        support: the labelled images, ``[support samples, channels, height, width]``.
        support_labels: int64 ``[support samples]``, each in ``0..way-1``.
        query: the images to classify, ``[queries, channels, height, width]``.
        query_labels: int64 ``[queries]``; what the method must not look at.
        way: the number of classes.

    A data set of episodes gives positions in the image bank, int64 ``[support samples]`` and ``[queries]``, in place of
    the images; the data module puts the images there, on the device. Loaders give episodes by the meta-batch: one
    ``Episode`` whose tensors have a leading dimension, the tasks.
    """

    support: torch.Tensor
    support_labels: torch.Tensor
    query: torch.Tensor
    query_labels: torch.Tensor
    way: int

    def tasks(self) -> Iterator["Episode"]:
        """The episodes of a meta-batch, which has a leading dimension of them before all of the above."""
        return (Episode._make((*tensors, self.way)) for tensors in zip(*self[:-1], strict=True))

    def split(self, tasks: int) -> Iterator["Episode"]:
        """The same meta-batch in smaller ones, of at most so many tasks."""
        pieces = (tensor.split(tasks) for tensor in self[:-1])
        return (Episode._make((*tensors, self.way)) for tensors in zip(*pieces, strict=True))


class EpisodeNumber(NamedTuple):
    """What names an episode of a given split and seed."""

    epoch: int
    number: int


def draw_episode(
    counts: NDArray[np.int64], way: int, shot: int, query: int, *, seed: int, split: str, epoch: int, number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw the classes of an episode, images of each, and an order of the support, without repeats and uniformly.

    Args:
        counts: how many images each class has, ``[classes]``.
        way: how many classes to draw.
        shot: how many support samples to draw of each.
        query: how many queries to draw of each.
        seed: of the run, for training episodes; of the evaluation, for the others.
        split: "train", "val" or "test".
        epoch: of training, which ends with a validation; each draws other episodes. Validation and test use 0.
        number: of the episode in its epoch, counted over all ranks: rank r of n draws r, r + n, r + 2n, ...

    Returns:
        The classes, int64 ``[way]``; image positions inside each class, int64 ``[way, shot + query]``; and the order
        in which the support samples come, int64 ``[way * shot]``, since some methods read them as a sequence.
    """
    random = np.random.default_rng([seed, SPLITS.index(split), epoch, number])
    classes = random.permutation(len(counts))[:way]
    # The order of uniform keys is a uniform shuffle; positions past the end of a smaller class sort last.
    keys = random.random((way, counts[classes].max()))
    keys[np.arange(keys.shape[1]) >= counts[classes, None]] = 2
    return classes, np.argsort(keys, axis=1)[:, : shot + query], random.permutation(way * shot)


class EpisodeDataset(Dataset[Episode]):
    """The episodes of one split of an image bank, as positions of their images.

    Args:
        bank: the images.
        split: whose classes to draw from.
        way: classes in an episode.
        shot: support samples a class.
        query: queries a class.
        seed: see ``draw_episode``.

    Raises:
        FewShotError: the split has fewer classes than ``way``, or a class fewer images than ``shot + query``.
    """

    def __init__(self, bank: ImageBank, split: str, way: int, shot: int, query: int, seed: int) -> None:
        self.split, self.way, self.shot, self.query, self.seed = split, way, shot, query, seed
        classes = bank.classes(split)
        self.first, self.counts = bank.offsets[classes], np.diff(bank.offsets)[classes]
        self._check(bank.class_names(split))
        labels = torch.arange(way)
        self.support_labels, self.query_labels = (
            labels.repeat_interleave(shot),
            labels.repeat_interleave(query),
        )

    def _check(self, names: list[str]) -> None:
        prefix = "train." if self.split == "train" else ""
        if len(names) < 2:
            raise FewShotError(
                f"the {self.split} split has {f'only the class {names[0]}' if names else 'no class'}, and there is "
                "nothing to tell apart; correct the labels or the splits of the data set"
            )
        if self.way > len(self.counts):
            raise FewShotError(
                f"{prefix}way={self.way} is more than the {len(self.counts)} classes of the {self.split} split; "
                f"choose {prefix}way={len(self.counts)} or less"
            )
        smallest = int(self.counts.argmin())
        if self.shot + self.query > self.counts[smallest]:
            raise FewShotError(
                f"{prefix}shot={self.shot} and {prefix}query={self.query} need {self.shot + self.query} images of "
                f"each class, but {names[smallest]} of the {self.split} split has {self.counts[smallest]}; "
                f"lower {prefix}shot or {prefix}query"
            )

    def __getitem__(self, episode: EpisodeNumber) -> Episode:
        make = self.way, self.shot, self.query
        classes, images, order = draw_episode(self.counts, *make, seed=self.seed, split=self.split, **episode._asdict())
        positions, shuffle = torch.from_numpy(self.first[classes, None] + images), torch.from_numpy(order)
        return Episode(
            support=positions[:, : self.shot].flatten()[shuffle],
            support_labels=self.support_labels[shuffle],
            query=positions[:, self.shot :].flatten(),
            query_labels=self.query_labels,
            way=self.way,
        )


def classes_of(episode: Episode, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which class each label of an episode stands for.

    Args:
        episode: of positions in the bank.
        first: the position of the first image of each class to choose from, ascending, ``[classes]``.

    Returns:
        The numbers of the classes, int64 ``[way]``.
    """
    classes = np.zeros(episode.way, dtype=np.int64)
    classes[episode.query_labels.numpy()] = np.searchsorted(first, episode.query.numpy(), side="right") - 1
    return classes


def stack(episodes: Sequence[Episode]) -> Episode:
    """Stack episodes of one make into a meta-batch."""
    *tensors, ways = zip(*episodes, strict=True)
    return Episode._make((*map(torch.stack, tensors), ways[0]))


class MetaBatchSampler(Sampler[list[EpisodeNumber]]):
    """The numbers of one rank's training episodes in a stretch of an epoch, a meta-batch at a time.

    Every rank gets as many batches as any other, since all take part in every step. Where there is no episode left for
    a rank, it is given one that counts for nothing.

    Args:
        episodes: how many there are, over all ranks; the last meta-batch takes what is left.
        meta_batch: episodes in a meta-batch, which the ranks share out.
        epoch: see ``draw_episode``.
        first: the number of the first one in its epoch.
        rank: this process, in ``0..world_size-1``.
        world_size: how many processes share the episodes.
        pieces: batches that a meta-batch comes in, over which the gradient is accumulated.

    Attributes:
        weights: of each batch's mean loss: the mean over all ranks and pieces is then the mean over all episodes of the
            meta-batch, however unequal the shares are.
    """

    def __init__(
        self,
        episodes: int,
        meta_batch: int,
        epoch: int = 0,
        first: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pieces: int = 1,
    ) -> None:
        self.epoch = epoch
        self.batches: list[range] = []
        self.weights: list[float] = []
        for start in range(first, first + episodes, meta_batch):
            together = range(start, min(start + meta_batch, first + episodes))
            for piece in range(pieces):
                of_all = together[meta_batch * piece // pieces : meta_batch * (piece + 1) // pieces]
                if of_all:
                    own = of_all[rank::world_size]
                    self.batches.append(own or of_all[:1])
                    self.weights.append(len(own) * world_size * pieces / len(together))

    def __iter__(self) -> Iterator[list[EpisodeNumber]]:
        return ([EpisodeNumber(self.epoch, number) for number in batch] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)
