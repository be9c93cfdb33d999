"""Episodes: which classes and images each one holds is a function of its number alone.

Nothing is stored between episodes and no generator runs on, so an episode can be rebuilt from its number, a run
resumes where it stopped, the ranks of a distributed run never draw the same episode, and two methods are compared
on the very same test episodes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fewshot.data.bank import SPLITS, ImageBank
from fewshot.errors import FewShotError
from fewshot.hardware import send

# From positions in the image bank, int64 [...], to what lies there: images [..., channels, height, width], or
# embeddings. Images can be asked for on another device than the positions are on: ``images(positions, device=...)``.
Gather = Callable[..., torch.Tensor]


class _Task(NamedTuple):
    """What the three forms of an episode have in common: which tensors there are, and how to take them apart."""

    support: torch.Tensor
    support_labels: torch.Tensor
    query: torch.Tensor
    query_labels: torch.Tensor
    way: int

    def tasks(self) -> Iterator[Self]:
        """The episodes of a meta-batch, whose tensors have a leading dimension, the tasks."""
        return (self.apply(itemgetter(task)) for task in range(len(self.query_labels)))

    def split(self, tasks: int) -> Iterator[Self]:
        """The same meta-batch in smaller ones, of at most so many tasks."""
        starts = range(0, len(self.query_labels), tasks)
        return (self.apply(itemgetter(slice(start, start + tasks))) for start in starts)

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with each tensor changed by a function."""
        support, query = change(self.support), change(self.query)
        return type(self)(support, change(self.support_labels), query, change(self.query_labels), self.way)


class Episode(_Task):
    """One few-shot task: classify the queries by the support samples.

    Attributes:
        support: the labelled images, ``[support samples, channels, height, width]``.
        support_labels: int64 ``[support samples]``, each in ``0..way-1``.
        query: the images to classify, ``[queries, channels, height, width]``.
        query_labels: int64 ``[queries]``; what the method must not look at.
        way: the number of classes.
    """

    __slots__ = ()


class EmbeddedEpisode(_Task):
    """An episode with embeddings in place of its images.

    Attributes:
        support: ``[support samples, ...]``; one embedding can have any shape: a vector, or feature maps.
        support_labels: int64 ``[support samples]``, each in ``0..way-1``.
        query: ``[queries, ...]``.
        query_labels: int64 ``[queries]``; what the method must not look at.
        way: the number of classes.
    """

    __slots__ = ()


class EpisodeIndex(_Task):
    """An episode as the positions of its images in the image bank.

    Attributes:
        support: int64 ``[support samples]``.
        support_labels: int64 ``[support samples]``, each in ``0..way-1``.
        query: int64 ``[queries]``.
        query_labels: int64 ``[queries]``.
        way: the number of classes.
    """

    __slots__ = ()

    def load(self, images: Gather) -> Episode:
        """The episode with its images, gathered together: a random transform draws for each of them."""
        loaded = images(torch.cat([self.support, self.query], dim=-1))
        support, query = loaded.tensor_split([self.support.shape[-1]], dim=-4)
        return Episode(support, self.support_labels, query, self.query_labels, self.way)

    def embed(self, embeddings: Gather) -> EmbeddedEpisode:
        """The episode with embeddings of its images."""
        return EmbeddedEpisode(
            embeddings(self.support), self.support_labels, embeddings(self.query), self.query_labels, self.way
        )


AnyEpisode = TypeVar("AnyEpisode", bound=_Task)


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


def check_task(split: str, names: Sequence[str], counts: Sequence[int], way: int, shot: int, query: int) -> None:
    """Refuse episodes that a split has too few classes or images for.

    Args:
        split: "train", "val" or "test".
        names: of its classes.
        counts: the images of each of them.
        way: classes in an episode.
        shot: support samples a class.
        query: queries a class.

    Raises:
        FewShotError: names what there is too little of, and the key to lower.
    """
    prefix = "train." if split == "train" else ""
    if len(names) < 2:
        raise FewShotError(
            f"the {split} split has {f'only the class {names[0]}' if names else 'no class'}, and there is nothing to "
            "tell apart; correct the labels or the splits of the data set"
        )
    if way > len(names):
        raise FewShotError(
            f"{prefix}way={way} is more than the {len(names)} classes of the {split} split; choose "
            f"{prefix}way={len(names)} or less"
        )
    fewest = min(counts)
    if shot + query > fewest:
        raise FewShotError(
            f"{prefix}shot={shot} and {prefix}query={query} need {shot + query} images of each class, but "
            f"{names[counts.index(fewest)]} of the {split} split has {fewest}; lower {prefix}shot or {prefix}query"
        )


class EpisodeDataset(Dataset[EpisodeIndex]):
    """The episodes of one split of an image bank.

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
        self.bank, self.split, self.way, self.shot, self.query, self.seed = bank, split, way, shot, query, seed
        classes = bank.classes(split)
        self.first, self.counts = bank.offsets[classes], np.diff(bank.offsets)[classes]
        check_task(split, bank.class_names(split), self.counts.tolist(), way, shot, query)
        labels = torch.arange(way)
        self.support_labels, self.query_labels = (
            labels.repeat_interleave(shot),
            labels.repeat_interleave(query),
        )

    def __getitem__(self, episode: EpisodeNumber) -> EpisodeIndex:
        make = self.way, self.shot, self.query
        classes, images, order = draw_episode(self.counts, *make, seed=self.seed, split=self.split, **episode._asdict())
        positions, shuffle = torch.from_numpy(self.first[classes, None] + images), torch.from_numpy(order)
        return EpisodeIndex(
            support=positions[:, : self.shot].flatten()[shuffle],
            support_labels=self.support_labels[shuffle],
            query=positions[:, self.shot :].flatten(),
            query_labels=self.query_labels,
            way=self.way,
        )


def classes_of(episode: EpisodeIndex, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which class each label of an episode stands for.

    Args:
        episode: the episode.
        first: the position of the first image of each class to choose from, ascending, ``[classes]``.

    Returns:
        The numbers of the classes, int64 ``[way]``.
    """
    classes = np.zeros(episode.way, dtype=np.int64)
    classes[episode.query_labels.numpy()] = np.searchsorted(first, episode.query.numpy(), side="right") - 1
    return classes


def stack(episodes: Sequence[AnyEpisode]) -> AnyEpisode:
    """Stack episodes of the same way, shot and number of queries into a meta-batch."""
    return type(episodes[0])(
        torch.stack([episode.support for episode in episodes]),
        torch.stack([episode.support_labels for episode in episodes]),
        torch.stack([episode.query for episode in episodes]),
        torch.stack([episode.query_labels for episode in episodes]),
        episodes[0].way,
    )


class Share(NamedTuple):
    """What one process does at once for a training step: its part of the step, or a piece of that.

    Attributes:
        numbers: of its episodes in their epoch.
        weight: of the mean loss of these: the mean over all processes and pieces is then the mean over all episodes of
            the meta-batch, however unequal the shares are.
        start: the training episodes before the step, over all processes.
        stop: the same after the step.
        completes: whether it is the last piece, after which the optimizer steps.
    """

    numbers: list[EpisodeNumber]
    weight: float = 1.0
    start: int = 0
    stop: int = 0
    completes: bool = False


def share_out(together: range, rank: int = 0, processes: int = 1, pieces: int = 1) -> Iterator[tuple[range, float]]:
    """One process's part of what a training step takes together, in pieces.

    Every process gets as many pieces as any other, since all take part in every step. Where there is nothing left for
    a process, it gets something with a weight of zero.

    Args:
        together: the numbers of what the step takes.
        rank: this process, in ``0..processes-1``.
        processes: how many share.
        pieces: how many batches a process takes its part in, to accumulate the gradient.

    Yields:
        The numbers of a piece, and its weight, see ``Share``.
    """
    for piece in range(pieces):
        of_all = together[len(together) * piece // pieces : len(together) * (piece + 1) // pieces]
        if of_all:
            own = of_all[rank::processes]
            yield own or of_all[:1], len(own) * processes * pieces / len(together)


class MetaBatch(NamedTuple):
    """Episodes that a method takes together, and all that it needs to know of them. ``to`` moves it to a device.

    Attributes:
        episodes: the labels, and the positions of the images; all tensors have a leading dimension, the tasks. The
            positions stay on the host, which looks up there what does not lie on a GPU.
        share: which episodes they are, and their part in the training step.
        images: where their images are.
    """

    episodes: EpisodeIndex
    share: Share
    images: Gather

    def to(self, device: torch.device | str) -> Self:
        """The same for a device, where ``load`` puts the images, too. The host does not wait for a GPU."""
        labels = (send(labels, device) for labels in (self.episodes.support_labels, self.episodes.query_labels))
        support_labels, query_labels = labels
        return self._replace(episodes=self.episodes._replace(support_labels=support_labels, query_labels=query_labels))

    def load(self) -> Episode:
        """The episodes with their images, all tensors with a leading dimension, the tasks."""
        return self.episodes.load(partial(self.images, device=self.episodes.query_labels.device))
