"""Pictures that are nearly the same: one that was recompressed, resized, re-encoded or mirrored, beside the first.

Each image has a thumbnail of 16 by 16 pixels. Those of two photos that are not the same hardly ever correlate by more
than 0.97, and those of a photo and its copy by less than 0.99. Drawings are another matter: two people's strokes of one
letter may cover the same 256 squares. Where most of an image is one flat background, thumbnails of 32 by 32 pixels have
to correlate, too, and of a grey one the mirror image counts as another drawing, as that of a b is a d.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 16  # pixels of a thumbnail
FINER_SIDE = 32  # of the one that drawings are compared by
ALIKE = 0.99  # the least correlation of two thumbnails
LEAST_CONTRAST = 2.0  # standard deviation of a thumbnail, of 255: below, all that correlates is rounding
FLAT = 0.5  # the share of pixels near the background from which on an image is a drawing
NEAR = 8  # of 255: a pixel so near the background is a part of it
# Two thumbnails with a correlation of 0.99 agree in a random bit with a probability of 1 - acos(0.99) / pi = 0.955, and
# so in all bits of at least one band with 0.96; with a correlation of 0.997, in 0.9997.
BANDS, BITS = 8, 24
MOST_BITS = 24  # of all 192, in which such two may differ: 9 on average, with a standard deviation of 3
MOST_ALIKE = 32  # of images with one code, each is compared with so many others
BLOCK = 8192  # images whose numbers are in memory as floats

Pixels = NDArray[np.uint8]
Pair = tuple[int, int, bool]  # two images, the first one first; and whether one is mirrored


def thumbnails(images: Pixels, side: int = SIDE) -> Pixels:
    """Small pictures to compare images by: each pixel the mean of the area it covers, of the green channel if any.

    Args:
        images: uint8 ``[images, height, width, channels]``.
        side: height and width of the small ones.

    Returns:
        uint8 ``[images, side * side]``, column after column, so that the last half of them is the right half.
    """
    count, height, width, channels = images.shape
    rows = images[..., channels // 2].reshape(count * height, width).astype(np.float32) @ _areas(width, side)
    columns = np.ascontiguousarray(rows.reshape(count, height, side).swapaxes(1, 2)).reshape(count * side, height)
    return (columns @ _areas(height, side)).round().astype(np.uint8).reshape(count, side * side)


def standardised(small: Pixels) -> NDArray[np.float32]:
    """Thumbnails whose product is their correlation; those of images with hardly any contrast are zero."""
    centred = small - small.mean(1, dtype=np.float32, keepdims=True)
    deviations = centred.std(1, keepdims=True)
    norms = np.where(deviations < LEAST_CONTRAST, np.inf, small.shape[1] ** 0.5 * deviations)
    return np.asarray(centred / norms, dtype=np.float32)


def candidates(small: Pixels) -> Iterator[Pair]:
    """The pairs of images whose thumbnails correlate, in ascending order; of many such, not each with each.

    Args:
        small: the thumbnails of all.
    """
    count = len(small)
    codes = _codes(small)
    found = np.empty(0, np.int64)
    for band in range(BANDS):
        order = np.argsort(codes[:, band], kind="stable")  # of the images, and after those of their mirror images
        sorted_codes = codes[order, band]
        pairs = [found]
        for step in range(1, MOST_ALIKE + 1):
            equal = np.flatnonzero(sorted_codes[step:] == sorted_codes[:-step])
            if not len(equal):
                break
            one, other = np.sort([order[equal], order[equal + step]], axis=0)
            near = np.bitwise_count(codes[one] ^ codes[other]).sum(1) <= MOST_BITS
            one, other = one[near], other[near]
            mirror = other >= count
            first, second = np.sort([one, other - count * mirror], axis=0)
            kept = (one < count) & (first != second)
            pairs.append(((first * count + second) * 2 + mirror)[kept])
        found = np.unique(np.concatenate(pairs))
    for start in range(0, len(found), BLOCK):
        of_block, mirror = np.divmod(found[start : start + BLOCK], 2)
        first, second = np.divmod(of_block, count)
        others = np.where(mirror[:, None] == 1, _mirrored(small[second]), small[second])
        alike = (standardised(small[first]) * standardised(others)).sum(1) >= ALIKE
        yield from zip(first[alike].tolist(), second[alike].tolist(), (mirror[alike] == 1).tolist(), strict=True)


def are_twins(one: Pixels, other: Pixels, mirror: bool) -> bool:
    """Whether two images whose thumbnails correlate are nearly the same.

    Args:
        one: uint8 ``[height, width, channels]``.
        other: uint8, of the same shape.
        mirror: it is the mirror image of ``other`` whose thumbnail correlates.
    """
    if not (_is_flat(one) or _is_flat(other)):
        return True
    if mirror and one.shape[-1] == 1:
        return False
    both = np.stack([one, other[:, ::-1] if mirror else other])
    fine = standardised(thumbnails(both, min(FINER_SIDE, *one.shape[:2])))
    return float(fine[0] @ fine[1]) >= ALIKE


class Known:
    """Images to find the like of.

    Args:
        images: uint8 ``[height, width, channels]`` each, all of one shape; at least one.
    """

    def __init__(self, images: Sequence[Pixels]) -> None:
        self._images = images
        small = thumbnails(np.stack(images))
        self._straight, self._mirrored = standardised(small), standardised(_mirrored(small))

    def find(self, image: Pixels) -> int | None:
        """The number of the first image that another one is nearly the same as; None: it is like none of them."""
        small = standardised(thumbnails(image[None]))[0]
        alike = np.stack([self._straight @ small, self._mirrored @ small], axis=1) >= ALIKE
        return next(
            (of for of, turn in np.argwhere(alike).tolist() if are_twins(image, self._images[of], turn == 1)), None
        )


def _codes(small: Pixels) -> NDArray[np.int32]:
    """On which side of random planes each thumbnail lies, and then each mirrored one: int32 ``[2 * images, bands]``."""
    planes = np.random.default_rng(0).standard_normal((SIDE * SIDE, BANDS * BITS), dtype=np.float32)
    turned = planes.reshape(SIDE, SIDE, -1)[::-1].reshape(planes.shape)
    powers = np.float32(2) ** np.arange(BITS, dtype=np.float32)
    codes = np.empty((2, len(small), BANDS), np.int32)
    for start in range(0, len(small), BLOCK):
        block = standardised(small[start : start + BLOCK])
        for of, sides in zip(codes, (planes, turned), strict=True):
            bits = (block @ sides > 0).reshape(-1, BANDS, BITS)
            of[start : start + BLOCK] = bits.astype(np.float32) @ powers
    return codes.reshape(-1, BANDS)


def _mirrored(small: Pixels) -> Pixels:
    """The thumbnails of the mirror images."""
    return small.reshape(len(small), SIDE, SIDE)[:, ::-1].reshape(len(small), SIDE * SIDE)


def _is_flat(image: Pixels) -> bool:
    """Whether most of an image is one colour, or nearly so: a drawing, or something on a plain ground."""
    pixels = image[..., image.shape[-1] // 2]
    return bool((np.abs(pixels - np.median(pixels)) <= NEAR).mean() >= FLAT)


@cache
def _areas(size: int, side: int) -> NDArray[np.float32]:
    """How much of each pixel of a line each pixel of its thumbnail covers, ``[size, side]``; the sum of each is 1."""
    edges = np.linspace(0, size, side + 1, dtype=np.float32)
    pixels = np.arange(size, dtype=np.float32)[:, None]
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.maximum(covered, 0) * np.float32(side / size)
