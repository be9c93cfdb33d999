"""Noise with a bright line: its row is the class."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from fewshot.data.bank import SPLITS, ImageClass, Source


def stripes(size: int, samples: int) -> Source:
    """A third of the rows for each split."""
    return Source(
        [],
        lambda: [
            ImageClass(f"row {n}", SPLITS[3 * n // size], samples, partial(_draw, n, size, samples))
            for n in range(size)
        ],
    )


def _draw(row: int, size: int, samples: int) -> NDArray[np.uint8]:
    images = np.random.default_rng(row).integers(0, 60, (samples, size, size, 1), dtype=np.uint8)
    images[:, row] += 120
    return images
