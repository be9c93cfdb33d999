"""Episodes: which classes and images each one holds is a function of its number alone.

No random state is kept between episodes. So an episode can be rebuilt from its number, a run resumes where it stopped,
the ranks of a distributed run never draw the same episode, and methods are compared on the same test episodes.
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

# From positions in the image bank, int64 [...], to images [..., channels, height, width] or embeddings. Images can be
# requested on a different device than that of the positions: ``images(positions, device=...)``.
Gather = Callable[..., torch.Tensor]


class _Task(NamedTuple):
    """Base of the three forms of an episode: its tensors, and how to split them."""

    support: torch.Tensor
    support_labels: torch.Tensor
    query: torch.Tensor
    query_labels: torch.Tensor
    way: int

    def tasks(self) -> Iterator[Self]:
        """Yield the episodes of a meta-batch, whose tensors have a leading dimension, the tasks."""
        return (self.apply(itemgetter(task)) for task in range(len(self.query_labels)))

    def split(self, tasks: int) -> Iterator[Self]:
        """Split a meta-batch into smaller ones of at most ``tasks`` tasks."""
        starts = range(0, len(self.query_labels), tasks)
        return (self.apply(itemgetter(slice(start, start + tasks))) for start in starts)

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply a function to each tensor."""
        support, query = change(self.support), change(self.query)
        return type(self)(support, change(self.support_labels), query, change(self.query_labels), self.way)


class Episode(_Task):
    """One few-shot task: classify the queries by the support samples.

    Attributes:
        support: the labelled images, ``[support samples, channels, height, width]``.
        support_labels: int64 ``[support samples]``, each in ``0..way-1``.
        query: the images to classify, ``[queries, channels, height, width]``.
        query_labels: int64 ``[queries]``; hidden from the method.
        way: the number of classes.
    """

    __slots__ = ()


class EmbeddedEpisode(_Task):
    """An episode with embeddings in place of its images.

    Attributes:
        support: ``[support samples, ...]``; an embedding can have any shape: a vector or feature maps.
        support_labels: int64 ``[support samples]``, each in ``0..way-1``.
        query: ``[queries, ...]``.
        query_labels: int64 ``[queries]``; hidden from the method.
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
        """Load the images, all in one call, so that a random transform draws separately for each of them."""
        loaded = images(torch.cat([self.support, self.query], dim=-1))
        support, query = loaded.tensor_split([self.support.shape[-1]], dim=-4)
        return Episode(support, self.support_labels, query, self.query_labels, self.way)

    def embed(self, embeddings: Gather) -> EmbeddedEpisode:
        """Load the embeddings of the images."""
        return EmbeddedEpisode(
            embeddings(self.support), self.support_labels, embeddings(self.query), self.query_labels, self.way
        )


AnyEpisode = TypeVar("AnyEpisode", bound=_Task)


class EpisodeNumber(NamedTuple):
    """Identifies an episode of a given split and seed."""

    epoch: int
    number: int


def draw_episode(
    counts: NDArray[np.int64], way: int, shot: int, query: int, *, seed: int, split: str, epoch: int, number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Draw the classes of an episode, images of each class, and an order of the support, uniformly without replacement.

    Args:
        counts: the number of images of each class, ``[classes]``.
        way: classes to draw.
        shot: support samples to draw per class.
        query: queries to draw per class.
        seed: of the run for training episodes, of the evaluation for others.
        split: "train", "val" or "test".
        epoch: the epoch of training, which ends with a validation. Validation and test use 0.
        number: the number of the episode in its epoch over all ranks: rank r of n draws r, r + n, r + 2n, ...

    Returns:
        The classes, int64 ``[way]``; image positions within each class, int64 ``[way, shot + query]``; and the order
        of the support samples, int64 ``[way * shot]``, because some methods read them as a sequence.
    """
    random = np.random.default_rng([seed, SPLITS.index(split), epoch, number])
    classes = random.permutation(len(counts))[:way]
    # The order of uniform keys is a uniform shuffle; positions past the end of a smaller class sort last.
    keys = random.random((way, counts[classes].max()))
    keys[np.arange(keys.shape[1]) >= counts[classes, None]] = 2
    return classes, np.argsort(keys, axis=1)[:, : shot + query], random.permutation(way * shot)


def draw_query_counts(
    most: NDArray[np.int64], total: int, concentration: float, key: Sequence[int]
) -> NDArray[np.int64]:
    """Draw how many queries each class of an episode has, with shares from a symmetric Dirichlet distribution.

    As in Veilleux et al., 2021, arXiv 2204.11181, section 3; a class may have none.

    Args:
        most: as many as each class can give, ``[way]``, together at least ``total``.
        total: queries of the episode.
        concentration: of the distribution, positive: the smaller, the less balanced.
        key: seeds the draw.

    Returns:
        int64 ``[way]``, whose sum is ``total``.
    """
    shares = np.random.default_rng(key).dirichlet(np.full(len(most), concentration))
    counts = np.minimum(np.floor(shares * total).astype(np.int64), most)
    while counts.sum() < total:  # the largest remainder of the classes that can give more
        counts[np.argmax(np.where(counts < most, shares * total - counts, -np.inf))] += 1
    return counts


def check_task(
    split: str, names: Sequence[str], counts: Sequence[int], way: int, shot: int, query: int, prefix: str = ""
) -> None:
    """Reject episodes that need more classes or images than a split has.

    Args:
        split: "train", "val" or "test".
        names: the names of its classes.
        counts: the number of images of each class.
        way: classes per episode.
        shot: support samples per class.
        query: queries per class.
        prefix: of the last three in the configuration: "train." in a training.

    Raises:
        FewShotError: there are too few classes or images; the message names the key to lower.
    """
    if len(names) < 2:
        raise FewShotError(
            f"the {split} split has {f'only the class {names[0]}' if names else 'no class'}; an episode needs at "
            "least 2: correct the labels or the splits of the data set"
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
        split: the split to draw classes from.
        way: classes per episode.
        shot: support samples per class.
        query: queries per class.
        seed: see ``draw_episode``.
        concentration: see ``draw_query_counts``; an episode has ``way * query`` queries. None: ``query`` per class.
        prefix: see ``check_task``.

    Raises:
        FewShotError: the split has fewer classes than ``way``, or a class fewer images than ``shot + query``.
    """

    def __init__(
        self,
        bank: ImageBank,
        split: str,
        way: int,
        shot: int,
        query: int,
        seed: int,
        concentration: float | None = None,
        prefix: str = "",
    ) -> None:
        self.bank, self.split, self.way, self.shot, self.query, self.seed = bank, split, way, shot, query, seed
        self.concentration = concentration
        classes = bank.classes(split)
        self.first, self.counts = bank.offsets[classes], np.diff(bank.offsets)[classes]
        check_task(split, bank.class_names(split), self.counts.tolist(), way, shot, query, prefix)
        labels = torch.arange(way)
        self.support_labels, self.query_labels = (
            labels.repeat_interleave(shot),
            labels.repeat_interleave(query),
        )

    def __getitem__(self, episode: EpisodeNumber) -> EpisodeIndex:
        make = self.way, self.shot, self.query
        if self.concentration is not None:
            make = self.way, self.shot, self.way * self.query  # as many as one class may have to give
        classes, images, order = draw_episode(self.counts, *make, seed=self.seed, split=self.split, **episode._asdict())
        positions, shuffle = torch.from_numpy(self.first[classes, None] + images), torch.from_numpy(order)
        query, query_labels = positions[:, self.shot :], self.query_labels
        if self.concentration is not None:
            most = np.minimum(self.counts[classes] - self.shot, query.shape[1])
            key = [self.seed, SPLITS.index(self.split), *episode, 1]
            counts = draw_query_counts(most, self.way * self.query, self.concentration, key)
            query = query[torch.arange(query.shape[1]) < torch.from_numpy(counts)[:, None]]
            query_labels = torch.arange(self.way).repeat_interleave(torch.from_numpy(counts))
        return EpisodeIndex(
            support=positions[:, : self.shot].flatten()[shuffle],
            support_labels=self.support_labels[shuffle],
            query=query.flatten(),
            query_labels=query_labels,
            way=self.way,
        )


def classes_of(episode: EpisodeIndex, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class that each label of an episode stands for.

    Args:
        episode: the episode.
        first: the position of the first image of each class, ascending, ``[classes]``.

    Returns:
        The numbers of the classes, int64 ``[way]``.
    """
    classes = np.zeros(episode.way, dtype=np.int64)
    classes[episode.support_labels.numpy()] = np.searchsorted(first, episode.support.numpy(), side="right") - 1
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
    """The share of one process in a training step, or one piece of it.

    Attributes:
        numbers: the numbers of its episodes.
        weight: the weight of their mean loss, such that the mean over all processes and pieces is the mean over all
            episodes of the meta-batch, however unequal the shares are.
        start: training episodes before the step, over all processes.
        stop: training episodes after the step.
        completes: whether this is the last piece, after which the optimizer steps.
    """

    numbers: list[EpisodeNumber]
    weight: float = 1.0
    start: int = 0
    stop: int = 0
    completes: bool = False


def share_out(together: range, rank: int = 0, processes: int = 1, pieces: int = 1) -> Iterator[tuple[range, float]]:
    """Yield the share of one process in a training step, in pieces.

    All processes get equally many pieces, because all take part in each step. If nothing is left for a process, it gets
    an item with a weight of zero.

    Args:
        together: the numbers of all items of the step.
        rank: this process, in ``0..processes-1``.
        processes: the number of processes.
        pieces: batches per process, over which the gradient is accumulated.

    Yields:
        The numbers of a piece, and its weight, see ``Share``.
    """
    for piece in range(pieces):
        items = together[len(together) * piece // pieces : len(together) * (piece + 1) // pieces]
        if items:
            own = items[rank::processes]
            yield own or items[:1], len(own) * processes * pieces / len(together)


class MetaBatch(NamedTuple):
    """Episodes that a method solves together. ``to`` moves them to a device.

    Attributes:
        episodes: labels and positions of images; all tensors have a leading dimension, the tasks. The positions stay
            on the host, which looks up images that are not on a GPU.
        share: the numbers of the episodes, and their part in the training step.
        images: loads images by position.
    """

    episodes: EpisodeIndex
    share: Share
    images: Gather

    def to(self, device: torch.device | str) -> Self:
        """Move it to a device, where ``load`` then puts the images; the host does not wait for a GPU."""
        labels = (send(labels, device) for labels in (self.episodes.support_labels, self.episodes.query_labels))
        support_labels, query_labels = labels
        return self._replace(episodes=self.episodes._replace(support_labels=support_labels, query_labels=query_labels))

    def load(self) -> Episode:
        """Load the images; all tensors have a leading dimension, the tasks."""
        return self.episodes.load(partial(self.images, device=self.episodes.query_labels.device))
