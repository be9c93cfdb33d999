"""Figure style: distinguishable in greyscale and by colour-blind readers."""

import math
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")  # Okabe & Ito's palette
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
}
WIDTH, DPI = 9, 110  # of a figure, in inches and pixels per inch: about the width of a page
MAX_HEIGHT = 100  # inches of the rows of a figure: matplotlib refuses pictures of more than 65,535 pixels


def fit_rows(height: float) -> tuple[float, int]:
    """Return the height of the rows of a figure, at most ``MAX_HEIGHT``, and the number of rows per label.

    Args:
        height: of all rows, in inches, if each has a name.
    """
    return min(height, MAX_HEIGHT), math.ceil(height / MAX_HEIGHT)
