"""Class batches: images with labels over all training classes, for methods that learn all of them at once.

Like an episode, a batch is a function of its number alone.
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
    """What one process trains on in one step of such a method. ``to`` moves it to a device.

    Attributes:
        positions: the positions of the images in the bank, int64 ``[batches, images]``; they stay on the host.
        labels: their classes, numbered from 0 within the training split, int64 ``[batches, images]``.
        share: the numbers of the batches, and their part in the training step.
        images: loads images by position.
    """

    positions: torch.Tensor
    labels: torch.Tensor
    share: Share
    images: Gather

    def to(self, device: torch.device | str) -> Self:
        """Move it to a device, where ``load`` then puts the images; the host does not wait for a GPU."""
        return self._replace(labels=send(self.labels, device))

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images, ``[images of all batches, channels, height, width]``, and their labels."""
        images = self.images(self.positions, device=self.labels.device)
        return images.flatten(0, 1), self.labels.flatten()


class ClassBatches:
    """The batches of the training classes of an image bank, in repeated passes over all images.

    Each pass has a different order. A batch may contain the last images of a pass and the first of the next.

    Args:
        bank: the images.
        batch_size: images in a batch.
        seed: the seed of the run.

    Raises:
        FewShotError: there are fewer than two training classes, or ``batch_size`` is missing or below 1.
    """

    def __init__(self, bank: ImageBank, batch_size: int | None, seed: int) -> None:
        if batch_size is None or batch_size < 1:
            raise FewShotError(
                f"train.batch_size={'null' if batch_size is None else batch_size} must be at least 1: this method "
                "trains on batches of images of all training classes"
            )
        if len(bank.classes("train")) < 2:
            raise FewShotError(
                f"the train split has {len(bank.classes('train'))} classes; training needs at least 2: "
                "correct the labels or the splits of the data set"
            )
        self.batch_size, self.seed = batch_size, seed
        self.positions, self.labels = bank.labelled("train")
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the most recent pass

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions in the bank and the labels of a batch, both int64 ``[images]``."""
        start, images = number * self.batch_size, len(self.positions)
        passes, offsets = np.divmod(np.arange(start, start + self.batch_size), images)
        drawn = [self._order_of(int(number))[offsets[passes == number]] for number in np.unique(passes)]
        chosen = torch.from_numpy(np.concatenate(drawn))
        return self.positions[chosen], self.labels[chosen]

    def _order_of(self, pass_number: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != pass_number:
            random = np.random.default_rng([self.seed, SPLITS.index("train"), pass_number])
            self._order = pass_number, random.permutation(len(self.positions))
        return self._order[1]
