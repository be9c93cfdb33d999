"""What a predictor learned from a support set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot.errors import FewShotError
from fewshot.familiarity import Familiarity, learn_familiarity
from fewshot.held_out import HeldOut, Learn, hold_out
from fewshot.methods.auto import Linear
from fewshot.methods.base import Classifier

Pixels = NDArray[np.uint8]
ROUNDING = 1e-5  # of an embedding's length: by how much that of the same image may differ from one batch to another


@dataclass(frozen=True)
class Learned:
    """Classes, and how to recognise them.

    Attributes:
        classes: their names.
        examples: of the classes: embeddings ``[examples, ...]`` if the method compares those, else pixels, uint8
            ``[examples, size, size, channels]``.
        labels: the class of each example, int64 ``[examples]``, on the CPU.
        represent: converts pixels to what ``examples`` holds.
        classify: a function from such to logits ``[images, way]``.
        learn: learns ``classify`` from other examples; None: too slow, or its answers depend on each other.
    """

    classes: tuple[Any, ...]
    examples: torch.Tensor
    labels: torch.Tensor
    represent: Callable[[Sequence[Pixels]], torch.Tensor]
    classify: Classifier
    learn: Learn | None

    def __call__(self, queries: Sequence[Pixels]) -> torch.Tensor:
        """Return the logits of one or more images, ``[images, way]`` on the CPU; their softmax are probabilities.

        Raises:
            FewShotError: a logit is not finite.
        """
        return self.answer(self.represent(queries))

    def answer(self, represented: torch.Tensor) -> torch.Tensor:
        """Return the same for the result of ``represent``."""
        logits = self.classify(represented).float().cpu()
        if not logits.isfinite().all():
            raise FewShotError(
                "the network's logits for these images are not finite (NaN or infinite); choose "
                "hardware.precision=32-true, or a different checkpoint"
            )
        return logits

    def copies(self, represented: torch.Tensor) -> list[int | None]:
        """Return which example each image is a copy of, by what ``represent`` returns; None: of none."""
        examples, images = (one.detach().flatten(1).double().cpu() for one in (self.examples, represented))
        same = torch.cdist(images, examples) <= ROUNDING * examples.norm(dim=1)
        return [int(row.nonzero()[0]) if row.any() else None for row in same]

    @cached_property
    def held_out(self) -> HeldOut | None:
        """Answers to the examples without having seen them; None if ``learn`` is, or each class has one example."""
        if isinstance(self.classify, Linear):
            return self.classify.held_out
        return None if self.learn is None else hold_out(self.learn, self.examples, self.labels, len(self.classes))

    @cached_property
    def familiarity(self) -> Familiarity | None:
        """How like the classes an image is; None if the method compares no embeddings."""
        if not self.examples.is_floating_point():
            return None
        return learn_familiarity(self.examples, self.labels, len(self.classes))

    def describe(self, names: Sequence[str]) -> Iterator[str]:
        """Yield lines for a user: the classifier, the accuracy to expect, confused classes and suspicious examples.

        Args:
            names: of the examples.
        """
        if isinstance(self.classify, Linear):
            yield f"classifier: {self.classify.name}; {self.classify.why}"
        if self.held_out is None:
            return
        accuracy, low, high = self.held_out.accuracy()
        most = self.held_out.together
        more = "one more example" if most == 1 else f"up to {most:,} more examples"
        yield (
            f"accuracy on {self.held_out.examples:,} held-out examples: {accuracy:.1%} (95% interval {low:.0%} to "
            f"{high:.0%}); with {more} per class, queries may be classified slightly better"
        )
        pairs = [
            f"{self.classes[one]} and {self.classes[other]} ({share:.0%})"
            for share, one, other in self.held_out.confused()
        ]
        if pairs:
            yield f"most often mistaken for each other: {', '.join(pairs)}"
        for example, label, probability in self.held_out.suspects():
            yield (
                f"{names[example]} looks like {self.classes[label]} ({probability:.0%}) instead of "
                f"{self.classes[self.labels[example]]}: is it in the wrong class?"
            )

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the same as plain data."""
        found: dict[str, Any] = {"classes": list(self.classes), "examples": self.labels.bincount().tolist()}
        if isinstance(self.classify, Linear):
            found |= {key: getattr(self.classify, key) for key in ("name", "why", "temperature")}
        if self.held_out is None:
            return found
        accuracy, low, high = self.held_out.accuracy()
        confused = [
            {"classes": [self.classes[one], self.classes[other]], "share": share}
            for share, one, other in self.held_out.confused()
        ]
        suspects = [
            {"example": names[example], "looks_like": self.classes[label], "probability": probability}
            for example, label, probability in self.held_out.suspects()
        ]
        left_out = {"accuracy": accuracy, "ci95": [low, high], "examples": self.held_out.examples}
        return found | {"leave_one_out": left_out, "confused": confused, "suspects": suspects}
