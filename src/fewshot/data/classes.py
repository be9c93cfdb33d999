"""Class batches: images of training classes with labels over all of these, for methods that learn them all at once.

As with episodes, what a batch holds is a function of its number alone.
"""

from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot.data.bank import SPLITS, ImageBank
from fewshot.data.episodes import Gather, Share
from fewshot.errors import FewShotError
from fewshot.hardware import send


class ClassBatch(NamedTuple):
    """What a process takes at once for a training step of such a method. ``to`` moves it to a device.

    Attributes:
        positions: of the images in the bank, int64 ``[batches, images]``; they stay on the host.
        labels: of their classes, numbered from 0 over the training split, int64 ``[batches, images]``.
        share: which batches they are, counted as episodes are, and their part in the training step.
        images: where their images are.
    """

    positions: torch.Tensor
    labels: torch.Tensor
    share: Share
    images: Gather

    def to(self, device: torch.device | str) -> Self:
        """The same for a device, where ``load`` puts the images, too. The host does not wait for a GPU."""
        return self._replace(labels=send(self.labels, device))

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The images, ``[images of all batches, channels, height, width]``, and their labels."""
        images = self.images(self.positions, device=self.labels.device)
        return images.flatten(0, 1), self.labels.flatten()


class ClassBatches:
    """The batches of the training classes of an image bank: one pass over all images after the other.

    Every pass has another order. A batch may have the last images of a pass and the first of the next one.

    Args:
        bank: the images.
        batch_size: images in a batch.
        seed: of the run.

    Raises:
        FewShotError: there is nothing to tell apart, or no number of images.
    """

    def __init__(self, bank: ImageBank, batch_size: int | None, seed: int) -> None:
        if batch_size is None or batch_size < 1:
            raise FewShotError(
                f"train.batch_size={'null' if batch_size is None else batch_size} must be at least 1: this method "
                "trains on batches of images of all training classes"
            )
        if len(bank.classes("train")) < 2:
            raise FewShotError(
                f"the train split has {len(bank.classes('train'))} classes, and there is nothing to tell apart; "
                "correct the labels or the splits of the data set"
            )
        self.batch_size, self.seed = batch_size, seed
        self.positions, self.labels = bank.labelled("train")
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the pass that was last asked for

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions in the bank and the labels of a batch, both int64 ``[images]``."""
        start, images = number * self.batch_size, len(self.positions)
        passes, places = np.divmod(np.arange(start, start + self.batch_size), images)
        drawn = [self._order_of(int(one))[places[passes == one]] for one in np.unique(passes)]
        chosen = torch.from_numpy(np.concatenate(drawn))
        return self.positions[chosen], self.labels[chosen]

    def _order_of(self, one: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != one:
            random = np.random.default_rng([self.seed, SPLITS.index("train"), one])
            self._order = one, random.permutation(len(self.positions))
        return self._order[1]
