"""What makes an accuracy lie though every image can be read: reported, and left to the user's judgement."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewshot.data.twins import are_twins, candidates, thumbnails

EXAMPLES = 3  # that a finding names
MOST_FOUND = 1000  # pairs that are nearly the same, of each kind; there may be very many, as in the frames of a film


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


# Of two places with the same picture, or nearly so: where they are, when that is so, and what comes of it.
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
        self._small: list[NDArray[np.uint8]] = []  # thumbnails
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
        self._small.append(thumbnails(images))
        self._starts.append(self._images)
        self._classes.append((split, name))
        self._images += len(images)

    def findings(self, image: Callable[[int], NDArray[np.uint8]]) -> list[str]:
        """A line for each kind of oddity; none for a data set that is in order.

        Args:
            image: gives back the pixels of an image by its number among all, uint8 ``[height, width, channels]``.
        """
        groups = [sorted(map(self._place, [first, *others])) for first, others in self._others.items()]
        lines = []
        for where, holds, consequence in TWINS:
            pairs = [pair for group in groups for pair in islice((p for p in pairwise(group) if holds(*p)), 1)]
            lines += _line(_named(pairs, " = "), f"pictures that are {where}, so that {consequence}")
        for (where, _, consequence), pairs in zip(TWINS, self._nearly_the_same(image), strict=True):
            finding = (
                f"pictures that are nearly the same (recompressed, resized or mirrored) {where}, so that {consequence}"
            )
            lines += _line(_named(pairs, " ~ "), finding, more=len(pairs) == MOST_FOUND)
        lines += _line(self._blank, "classes that are blank, every image of one colour")
        lines += _line(self._alike, "classes that hold one picture over and over")
        return lines

    def _nearly_the_same(self, image: Callable[[int], NDArray[np.uint8]]) -> list[list[tuple[Place, Place]]]:
        """Of each kind of ``TWINS`` the pairs that are nearly the same and not the same, each picture taken once."""
        once = np.array(list(self._first.values()), dtype=np.int64)
        found: list[list[tuple[Place, Place]]] = [[] for _ in TWINS]
        last = None
        for one, other, mirror in candidates(np.concatenate(self._small)[once]):
            numbers = int(once[one]), int(once[other])
            pair = self._place(numbers[0]), self._place(numbers[1])
            of_kind = next(pairs for pairs, (_, holds, _) in zip(found, TWINS, strict=True) if holds(*pair))
            if (
                numbers != last
                and len(of_kind) < MOST_FOUND
                and are_twins(image(numbers[0]), image(numbers[1]), mirror)
            ):
                of_kind.append(pair)
                last = numbers  # mirrored, it may be a candidate once more
        return found

    def _place(self, image: int) -> Place:
        of = bisect_right(self._starts, image) - 1
        return Place(*self._classes[of], image - self._starts[of] + 1)


def _named(pairs: Sequence[tuple[Place, Place]], sign: str) -> list[str]:
    return [sign.join(f"{of.name} number {of.number} ({of.split})" for of in pair) for pair in pairs]


def _line(examples: Sequence[str], finding: str, more: bool = False) -> list[str]:
    shown = ", ".join(examples[:EXAMPLES]) + (", ..." if len(examples) > EXAMPLES else "")
    return [f"{finding}: {shown} ({len(examples):,}{' or more' if more else ''} in all)"] if examples else []
