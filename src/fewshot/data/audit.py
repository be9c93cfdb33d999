"""What makes an accuracy lie though every image can be read: told, and left to the user's judgement."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EXAMPLES = 3  # that a finding names


class Place(NamedTuple):
    """Where an image is.

    Attributes:
        split: "train", "val" or "test".
        name: of its class.
        number: in its class, from 1.
    """

    split: str
    name: str
    number: int


# Of two places with the same picture, pixel for pixel: where they are, when that is so, and what comes of it.
TWINS: Sequence[tuple[str, Callable[[Place, Place], bool], str]] = (
    ("in more than one split", lambda a, b: a.split != b.split, "the network is judged by what it has seen"),
    ("in two classes of a split", lambda a, b: a.split == b.split and a.name != b.name, "nothing tells these apart"),
    ("twice in a class", lambda a, b: a.name == b.name, "a query may be its own support sample"),
)


class Audit:
    """Looks at the classes of a data set one by one, and tells what is odd about the whole."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # the first image of each class, counted over all
        self._classes: list[tuple[str, str]] = []  # split and name
        self._images = 0
        self._first: dict[int, int] = {}  # the first image with a hash of its pixels
        self._others: dict[int, list[int]] = defaultdict(list)  # by the first one, the images equal to it
        self._blank: list[str] = []
        self._alike: list[str] = []

    def add(self, name: str, split: str, images: NDArray[np.uint8]) -> None:
        """Take in one class.

        Args:
            name: unique in the data set.
            split: "train", "val" or "test".
            images: all of the class, uint8 ``[images, height, width, channels]``.
        """
        pixels, size = images.tobytes(), images[0].size
        # Python's own hash: quick, and as it is another one in each process, nobody can foresee what would collide.
        hashes = [hash(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        for image, of in enumerate(hashes, start=self._images):
            first = self._first.setdefault(of, image)
            if first != image:
                self._others[first].append(image)
        if all((image == image[0, 0]).all() for image in images):
            self._blank.append(f"{name} ({split})")
        elif len(set(hashes)) == 1 < len(images):
            self._alike.append(f"{name} ({split})")
        self._starts.append(self._images)
        self._classes.append((split, name))
        self._images += len(images)

    def findings(self) -> list[str]:
        """A line for each kind of oddity; none for a data set that is in order."""
        groups = [sorted(map(self._place, [first, *others])) for first, others in self._others.items()]
        lines = []
        for where, holds, consequence in TWINS:
            pairs = [pair for group in groups for pair in islice((p for p in pairwise(group) if holds(*p)), 1)]
            examples = [" = ".join(f"{of.name} number {of.number} ({of.split})" for of in pair) for pair in pairs]
            lines += _line(examples, f"pictures that are {where}, so that {consequence}")
        lines += _line(self._blank, "classes that are blank, every image of one colour")
        lines += _line(self._alike, "classes that hold one picture over and over")
        return lines

    def _place(self, image: int) -> Place:
        of = bisect_right(self._starts, image) - 1
        return Place(*self._classes[of], image - self._starts[of] + 1)


def _line(examples: Sequence[str], told: str) -> list[str]:
    shown = ", ".join(examples[:EXAMPLES]) + (", ..." if len(examples) > EXAMPLES else "")
    return [f"{told}: {shown} ({len(examples):,} in all)"] if examples else []
