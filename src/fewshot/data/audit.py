"""Data-quality checks: duplicate and blank images. They are reported; whether they matter is for the user to judge."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewshot.data.twins import are_twins, candidates, thumbnails

EXAMPLES = 3  # shown in a finding
MAX_FOUND = 1000  # near-duplicate pairs of each kind; there may be very many, as in the frames of a film


class Position(NamedTuple):
    """Where an image is in a data set.

    Attributes:
        split: "train", "val" or "test".
        name: the name of its class.
        number: its number in the class, from 1.
    """

    split: str
    name: str
    number: int


# Kinds of duplicates: where the two images are, the condition for that, and the consequence.
DUPLICATES: Sequence[tuple[str, Callable[[Position, Position], bool], str]] = (
    ("in more than one split", lambda a, b: a.split != b.split, "the network is tested on what it was trained on"),
    ("in two classes of a split", lambda a, b: a.split == b.split and a.name != b.name, "nothing distinguishes these"),
    ("twice in a class", lambda a, b: a.name == b.name, "a query may be among its own support samples"),
)


class Audit:
    """Checks the classes of a data set one by one, and reports what is odd about the whole."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # the number of the first image of each class
        self._classes: list[tuple[str, str]] = []  # split and name
        self._images = 0
        self._first: dict[int, int] = {}  # the first image with each hash of pixels
        self._others: dict[int, list[int]] = defaultdict(list)  # later images equal to a first one
        self._thumbnails: list[NDArray[np.uint8]] = []
        self._blank: list[str] = []
        self._repeated: list[str] = []

    def add(self, name: str, split: str, images: NDArray[np.uint8]) -> None:
        """Check one class.

        Args:
            name: unique in the data set.
            split: "train", "val" or "test".
            images: all images of the class, uint8 ``[images, height, width, channels]``.
        """
        pixels, size = images.tobytes(), images[0].size
        # Python's hash is fast, and it is salted in each process, so nobody can construct collisions.
        hashes = [hash(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        for image, pixel_hash in enumerate(hashes, start=self._images):
            first = self._first.setdefault(pixel_hash, image)
            if first != image:
                self._others[first].append(image)
        if all((image == image[0, 0]).all() for image in images):
            self._blank.append(f"{name} ({split})")
        elif len(set(hashes)) == 1 < len(images):
            self._repeated.append(f"{name} ({split})")
        self._thumbnails.append(thumbnails(images))
        self._starts.append(self._images)
        self._classes.append((split, name))
        self._images += len(images)

    def findings(self, image: Callable[[int], NDArray[np.uint8]]) -> list[str]:
        """Return one line for each kind of problem; none if there are no problems.

        Args:
            image: returns the pixels of an image by its number in the data set, uint8 ``[height, width, channels]``.
        """
        groups = [sorted(map(self._position, [first, *others])) for first, others in self._others.items()]
        lines = []
        for where, holds, consequence in DUPLICATES:
            pairs = [pair for group in groups for pair in islice((pair for pair in pairwise(group) if holds(*pair)), 1)]
            lines += _line(_named(pairs, " = "), f"duplicate images {where}, so that {consequence}")
        for (where, _, consequence), pairs in zip(DUPLICATES, self._near_duplicates(image), strict=True):
            finding = f"near-duplicate images (recompressed, resized or mirrored) {where}, so that {consequence}"
            lines += _line(_named(pairs, " ~ "), finding, more=len(pairs) == MAX_FOUND)
        lines += _line(self._blank, "blank classes, in which every image has one colour")
        lines += _line(self._repeated, "classes that consist of one repeated image")
        return lines

    def _near_duplicates(self, image: Callable[[int], NDArray[np.uint8]]) -> list[list[tuple[Position, Position]]]:
        """Return the near-duplicate pairs of each kind in ``DUPLICATES``; of equal images, only the first counts."""
        distinct = np.array(list(self._first.values()), dtype=np.int64)
        found: list[list[tuple[Position, Position]]] = [[] for _ in DUPLICATES]
        last = None
        for one, other, mirror in candidates(np.concatenate(self._thumbnails)[distinct]):
            numbers = int(distinct[one]), int(distinct[other])
            pair = self._position(numbers[0]), self._position(numbers[1])
            same_kind = next(pairs for pairs, (_, holds, _) in zip(found, DUPLICATES, strict=True) if holds(*pair))
            if (
                numbers != last
                and len(same_kind) < MAX_FOUND
                and are_twins(image(numbers[0]), image(numbers[1]), mirror)
            ):
                same_kind.append(pair)
                last = numbers  # the mirrored pair may follow
        return found

    def _position(self, image: int) -> Position:
        number = bisect_right(self._starts, image) - 1
        return Position(*self._classes[number], image - self._starts[number] + 1)


def _named(pairs: Sequence[tuple[Position, Position]], sign: str) -> list[str]:
    return [sign.join(f"{image.name} number {image.number} ({image.split})" for image in pair) for pair in pairs]


def _line(examples: Sequence[str], finding: str, more: bool = False) -> list[str]:
    shown = ", ".join(examples[:EXAMPLES]) + (", ..." if len(examples) > EXAMPLES else "")
    return [f"{finding}: {shown} ({len(examples):,}{' or more' if more else ''} in all)"] if examples else []
