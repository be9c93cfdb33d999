"""Whether images are of the kind a network knows: a network of letters answers photos, too, but not sensibly."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewshot.text import say

Kind = Literal["letters", "photos"]
# Measured on 400 characters of Omniglot and 800 photos of miniImageNet, at 28 to 224 pixels: of every character, at
# least 0.71 is background; of 8% of the photos, more than 0.6 is, and of 2%, without colour.
PLAIN = 0.6  # least share of a letter's or drawing's pixels that are background
NEAR = 16  # of 255: a pixel this close to the median of the edges belongs to the background
COLOURLESS = 0.9  # least share of pixels whose channels are this close to each other
FIXES = {
    "letters": "for photos, choose encoder=pretrained instead of a checkpoint",
    "photos": "for letters, choose a network that was trained on some: checkpoint=omniglot/protonet",
}


def is_drawn(pixels: NDArray[np.uint8]) -> bool:
    """Return whether an image looks like a letter or drawing: without colour, on a plain background.

    Args:
        pixels: uint8 ``[height, width, channels]``.
    """
    grey = pixels.mean(-1)
    edges = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    plain = (np.abs(grey - np.median(edges)) <= NEAR).mean()
    colourless = (np.ptp(pixels, axis=-1) <= NEAR).mean()
    return bool(plain >= PLAIN and colourless >= COLOURLESS)


def warn_of_mismatch(known: Kind | None, drawn: Sequence[bool], name: str) -> None:
    """Print what ``mismatch`` returns as a warning."""
    line = mismatch(known, drawn, name)
    if line is not None:
        say(f"warning: {line}", error=True)


def mismatch(known: Kind | None, drawn: Sequence[bool], name: str, fix: str | None = None) -> str | None:
    """Return a line for a user if most images are not of the kind that a network knows.

    Args:
        known: that kind; None: not known, and there is no line.
        drawn: ``is_drawn`` of each image.
        name: of the images: "queries".
        fix: what to do; None: what to choose on a command line.
    """
    strange = sum(drawn) if known == "photos" else len(drawn) - sum(drawn)
    if known is None or strange <= len(drawn) / 2:
        return None
    seen = "photos" if known == "letters" else "letters or drawings"
    return (
        f"{strange:,} of the {len(drawn):,} {name} look like {seen}, but this network knows {known}, so its answers "
        f"mean little; {fix or FIXES[known]}"
    )
