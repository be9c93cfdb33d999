"""Near-duplicate images: copies that were recompressed, resized, re-encoded or mirrored.

Each image has a thumbnail of 16 by 16 pixels. The thumbnails of two different photos rarely correlate by more than
0.97, and those of a photo and its copy rarely by less than 0.99. Drawings differ: two people's strokes of a letter may
cover the same 256 squares. If most of an image is one flat background, thumbnails of 32 by 32 pixels have to correlate,
too; and the mirror image of a grey one is a different drawing, as b and d are different letters.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 16  # pixels of a thumbnail
FINER_SIDE = 32  # of the thumbnails that compare drawings
ALIKE = 0.99  # minimum correlation of two thumbnails
MIN_CONTRAST = 2.0  # standard deviation of a thumbnail, of 255: below it, only rounding correlates
FLAT = 0.5  # minimum share of background pixels in a drawing
NEAR = 8  # of 255: a pixel this close to the background belongs to it
# Two thumbnails with a correlation of 0.99 agree in a random bit with a probability of 1 - acos(0.99) / pi = 0.955, and
# so in all bits of at least one band with 0.96; with a correlation of 0.997, in 0.9997.
BANDS, BITS = 8, 24
MAX_BITS = 24  # of all 192, in which two such thumbnails may differ: 9 on average, with a standard deviation of 3
MAX_ALIKE = 32  # comparisons of each image among those with an equal code
BLOCK = 8192  # images that are in memory as floats at a time

Pixels = NDArray[np.uint8]
Pair = tuple[int, int, bool]  # two images in ascending order, and whether one is mirrored


def thumbnails(images: Pixels, side: int = SIDE) -> Pixels:
    """Shrink images for comparison: each pixel is the mean of its area, of the green channel if there is one.

    Args:
        images: uint8 ``[images, height, width, channels]``.
        side: height and width of the thumbnails.

    Returns:
        uint8 ``[images, side * side]``, column by column, so that the last half is the right half.
    """
    count, height, width, channels = images.shape
    rows = images[..., channels // 2].reshape(count * height, width).astype(np.float32) @ _areas(width, side)
    columns = np.ascontiguousarray(rows.reshape(count, height, side).swapaxes(1, 2)).reshape(count * side, height)
    return (columns @ _areas(height, side)).round().astype(np.uint8).reshape(count, side * side)


def standardised(small: Pixels) -> NDArray[np.float32]:
    """Scale thumbnails so that their product is their correlation; those with hardly any contrast become zero."""
    centred = small - small.mean(1, dtype=np.float32, keepdims=True)
    deviations = centred.std(1, keepdims=True)
    norms = np.where(deviations < MIN_CONTRAST, np.inf, small.shape[1] ** 0.5 * deviations)
    return np.asarray(centred / norms, dtype=np.float32)


def candidates(small: Pixels) -> Iterator[Pair]:
    """Yield the pairs of images whose thumbnails correlate, in ascending order; of a large group, not all pairs.

    Args:
        small: the thumbnails of all images.
    """
    count = len(small)
    codes = _codes(small)
    found = np.empty(0, np.int64)
    for band in range(BANDS):
        order = np.argsort(codes[:, band], kind="stable")  # of the images, followed by their mirror images
        sorted_codes = codes[order, band]
        pairs = [found]
        for step in range(1, MAX_ALIKE + 1):
            equal = np.flatnonzero(sorted_codes[step:] == sorted_codes[:-step])
            if not len(equal):
                break
            one, other = np.sort([order[equal], order[equal + step]], axis=0)
            near = np.bitwise_count(codes[one] ^ codes[other]).sum(1) <= MAX_BITS
            one, other = one[near], other[near]
            mirror = other >= count
            first, second = np.sort([one, other - count * mirror], axis=0)
            kept = (one < count) & (first != second)
            pairs.append(((first * count + second) * 2 + mirror)[kept])
        found = np.unique(np.concatenate(pairs))
    for start in range(0, len(found), BLOCK):
        pairs_of_block, mirror = np.divmod(found[start : start + BLOCK], 2)
        first, second = np.divmod(pairs_of_block, count)
        others = np.where(mirror[:, None] == 1, _mirrored(small[second]), small[second])
        alike = (standardised(small[first]) * standardised(others)).sum(1) >= ALIKE
        yield from zip(first[alike].tolist(), second[alike].tolist(), (mirror[alike] == 1).tolist(), strict=True)


def are_twins(one: Pixels, other: Pixels, mirror: bool) -> bool:
    """Return whether two images whose thumbnails correlate are near-duplicates.

    Args:
        one: uint8 ``[height, width, channels]``.
        other: uint8, of the same shape.
        mirror: the thumbnail of the mirror image of ``other`` correlates.
    """
    if not (_is_flat(one) or _is_flat(other)):
        return True
    if mirror and one.shape[-1] == 1:
        return False
    both = np.stack([one, other[:, ::-1] if mirror else other])
    fine = standardised(thumbnails(both, min(FINER_SIDE, *one.shape[:2])))
    return float(fine[0] @ fine[1]) >= ALIKE


class Known:
    """Finds near-duplicates of known images.

    Args:
        images: uint8 ``[height, width, channels]`` each, all of one shape; at least one.
    """

    def __init__(self, images: Sequence[Pixels]) -> None:
        self._images = images
        small = thumbnails(np.stack(images))
        self._straight, self._mirrored = standardised(small), standardised(_mirrored(small))

    def find(self, image: Pixels) -> int | None:
        """Return the number of the first known image that ``image`` is a near-duplicate of, or None."""
        small = standardised(thumbnails(image[None]))[0]
        alike = np.stack([self._straight @ small, self._mirrored @ small], axis=1) >= ALIKE
        pairs = np.argwhere(alike).tolist()
        return next((known for known, turn in pairs if are_twins(image, self._images[known], turn == 1)), None)


def _codes(small: Pixels) -> NDArray[np.int32]:
    """Return on which side of random planes thumbnails lie, then mirrored ones: int32 ``[2 * images, bands]``."""
    planes = np.random.default_rng(0).standard_normal((SIDE * SIDE, BANDS * BITS), dtype=np.float32)
    turned = planes.reshape(SIDE, SIDE, -1)[::-1].reshape(planes.shape)
    powers = np.float32(2) ** np.arange(BITS, dtype=np.float32)
    codes = np.empty((2, len(small), BANDS), np.int32)
    for start in range(0, len(small), BLOCK):
        block = standardised(small[start : start + BLOCK])
        for half, sides in zip(codes, (planes, turned), strict=True):
            bits = (block @ sides > 0).reshape(-1, BANDS, BITS)
            half[start : start + BLOCK] = bits.astype(np.float32) @ powers
    return codes.reshape(-1, BANDS)


def _mirrored(small: Pixels) -> Pixels:
    """Return the thumbnails of the mirror images."""
    return small.reshape(len(small), SIDE, SIDE)[:, ::-1].reshape(len(small), SIDE * SIDE)


def _is_flat(image: Pixels) -> bool:
    """Return whether most of an image has nearly one colour: a drawing, or an object on a plain background."""
    pixels = image[..., image.shape[-1] // 2]
    return bool((np.abs(pixels - np.median(pixels)) <= NEAR).mean() >= FLAT)


@cache
def _areas(size: int, side: int) -> NDArray[np.float32]:
    """Return the weight of each pixel of a line in each pixel of its thumbnail, ``[size, side]``; they add up to 1."""
    edges = np.linspace(0, size, side + 1, dtype=np.float32)
    pixels = np.arange(size, dtype=np.float32)[:, None]
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return np.maximum(covered, 0) * np.float32(side / size)
