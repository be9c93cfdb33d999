"""How good a classifier of a few examples is, found by leaving some of them out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fewshot.methods.base import Classifier

FITS = 20  # classifiers learned from parts of the examples
SUSPICIOUS = 0.8  # an example is named if a different class has at least this probability
NAMED = 5  # pairs of classes, and examples, that are named

Learn = Callable[[torch.Tensor, torch.Tensor, int], Classifier]  # see ``MetricMethod.learn``


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Answers to examples that their classifier had not seen.

    Attributes:
        logits: ``[answers, way]``; an example may have several answers.
        index: the example of each answer, int64 ``[answers]``.
        labels: the class of each of all examples, int64 ``[examples]``.
    """

    logits: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor

    @property
    def examples(self) -> int:
        """The number of examples with an answer."""
        return len(self.index.unique())

    @property
    def together(self) -> int:
        """The most examples of a class that were left out together, see ``parts``."""
        return -(-int(self.labels.bincount().max()) // FITS)

    def losses(self, temperature: float) -> torch.Tensor:
        """Return the mean cross-entropy of the answers to each example, ``[examples with an answer]``."""
        losses = torch.nn.functional.cross_entropy(self.logits / temperature, self.labels[self.index], reduction="none")
        return self._mean(losses[:, None])[:, 0]

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the examples with an answer, int64, and the mean probabilities of each, ``[examples, way]``."""
        return self.index.unique(), self._mean(self.logits.softmax(1))

    def accuracy(self) -> tuple[float, float, float]:
        """Return the accuracy, and the ends of its 95% confidence interval (Wilson's, over the examples)."""
        right = float(self._mean((self.logits.argmax(1) == self.labels[self.index]).double()[:, None]).sum())
        share, z = right / self.examples, 1.96**2 / self.examples
        # Not by SciPy, which takes whole numbers: an example may be left out several times, with different answers.
        half = (z * share * (1 - share) + z**2 / 4) ** 0.5
        low, high = ((share + z / 2 + sign * half) / (1 + z) for sign in (-1, 1))
        return share, max(low, 0.0), min(high, 1.0)

    def confused(self) -> list[tuple[float, int, int]]:
        """Return the pairs of classes most often mistaken for each other, with the share of their examples."""
        examples, way = self.index.unique(), self.logits.shape[1]
        answers = self._mean(torch.nn.functional.one_hot(self.logits.argmax(1), way).double())
        counts = torch.zeros(way, way, dtype=torch.float64).index_add_(0, self.labels[examples], answers)
        totals = self.labels[examples].bincount(minlength=way)
        both = (counts + counts.mT) / (totals[:, None] + totals).clamp_min(1)
        pairs = [(float(both[i, j]), i, j) for i in range(way) for j in range(i + 1, way) if both[i, j] > 0]
        return sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))[:NAMED]

    def suspects(self) -> list[tuple[int, int, float]]:
        """Return examples that look mislabelled: the example, the class it looks like, and that class's probability."""
        examples, probabilities = self.probabilities()
        best = probabilities.max(1)
        found = [
            (example, label, probability)
            for example, label, probability in zip(
                examples.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
            )
            if label != self.labels[example] and probability >= SUSPICIOUS
        ]
        return sorted(found, key=lambda suspect: -suspect[2])[:NAMED]

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        _, position = self.index.unique(return_inverse=True)
        sums = values.new_zeros(int(position.max()) + 1, values.shape[1]).index_add_(0, position, values)
        return sums / position.bincount()[:, None]


def parts(labels: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the examples to leave out together, int64: one of every class at a time, in several random pairings.

    Leaving out a single example would leave its class with fewer examples than the others, which makes a classifier of
    few examples reject it. With more than ``FITS`` examples a class, several of each are left out together. A class
    with one example keeps it.

    Args:
        labels: int64 ``[examples]``.
    """
    generator = torch.Generator().manual_seed(0)
    counts = labels.bincount()
    together = min(int(counts.max()), FITS)
    for _ in range(FITS // together if together > 1 else 0):
        part = torch.full_like(labels, -1)
        for label in range(len(counts)):
            examples = (labels == label).nonzero()[:, 0]
            if len(examples) > 1:
                part[examples[torch.randperm(len(examples), generator=generator)]] = (
                    torch.arange(len(examples)) % together
                )
        for number in range(together):
            yield (part == number).nonzero()[:, 0]


def hold_out(learn: Learn, support: torch.Tensor, labels: torch.Tensor, way: int) -> HeldOut | None:
    """Answer examples by classifiers that were learned without them; None if every class has a single one.

    Args:
        learn: see ``MetricMethod.learn``.
        support: ``[examples, ...]``.
        labels: int64 ``[examples]``, on the CPU.
        way: the number of classes.
    """
    left_out = list(parts(labels))
    if not left_out:
        return None
    logits = []
    for part in left_out:
        kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, part, value=False).to(support.device)
        learned = learn(support[kept], labels.to(support.device)[kept], way)
        logits.append(learned(support[part.to(support.device)]).float().cpu())
    return HeldOut(torch.cat(logits), torch.cat(left_out), labels)
