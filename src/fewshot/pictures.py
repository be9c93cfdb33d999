"""Pictures of episodes and of confusions between classes, for the dashboard, evaluations and figures."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from fewshot.data.bank import ImageBank
from fewshot.data.episodes import EpisodeIndex, classes_of
from fewshot.style import COLOURS, STYLE
from fewshot.text import cut, for_figure

ROWS, SUPPORT, QUERIES = 10, 5, 15  # limits for an episode: classes, and support samples and queries per class
MATRIX = 12  # largest number of classes in a confusion matrix
HARDEST = 15  # number of classes shown if there are more
NAME = 18  # characters of a name
CARD = 4.2  # width in inches that is legible in TensorBoard, whose cards scale pictures to 3 or 4 inches


def draw_episode(
    bank: ImageBank,
    episode: EpisodeIndex,
    answers: NDArray[np.int64] | None = None,
    support: int = SUPPORT,
    queries: int = QUERIES,
) -> Figure:
    """Draw an episode, one row per class: the support samples, and the queries with the answers to them.

    Args:
        bank: the images.
        episode: positions in the bank.
        answers: the predicted label of each query, int64 ``[queries]``; None: not solved yet.
        support: most support samples per class to draw.
        queries: most queries per class to draw.
    """
    way = min(episode.way, ROWS)
    sides = []  # for support and queries: the samples to draw, by label
    for labels, most in ((episode.support_labels, support), (episode.query_labels, queries)):
        sides.append([torch.nonzero(labels == label).flatten()[:most] for label in range(way)])
    columns = [max(map(len, side)) for side in sides]
    letters = NAME if sum(columns) < 10 else 30
    side, gap = bank.images.shape[1], max(2, bank.images.shape[1] // 8)
    cell = side + 2 * gap
    canvas = np.full((way * cell, (sum(columns) + 1) * cell, bank.images.shape[3]), 255, dtype=np.uint8)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.42 * (sum(columns) + 1) + 0.09 * letters, 0.42 * way + 0.8), layout="constrained")
        axes = figure.subplots()
        for label in range(way):
            for drawn, positions, start in zip(
                sides, (episode.support, episode.query), (0, columns[0] + 1), strict=True
            ):
                for column, sample in enumerate(drawn[label].tolist(), start):
                    y, x = label * cell + gap, column * cell + gap
                    canvas[y : y + side, x : x + side] = bank.images[positions[sample]].numpy()
                    if positions is episode.query and answers is not None:
                        _frame(axes, (x, y), side, gap, label, int(answers[sample]))
        names = [
            for_figure(cut(bank.names[number], letters)) for number in classes_of(episode, bank.offsets[:-1])[:way]
        ]
        axes.imshow(np.broadcast_to(canvas, (*canvas.shape[:2], 3)), interpolation="nearest")
        title = "queries"
        if answers is not None:
            right = int((answers == episode.query_labels.numpy()).sum())
            title += f": {right} of {len(answers)} right"
            axes.set_xlabel("thick frame: wrong, with the number of the answer", fontsize=9, loc="left")
        for text, start in (("support", 0), (title, columns[0] + 1)):
            axes.text(start * cell + gap / 2, -gap, text, fontsize=9, va="bottom")
        axes.set_yticks(
            [(row + 0.5) * cell for row in range(way)],
            [f"{name}  {row}" for row, name in enumerate(names, 1)],
            fontsize=8,
        )
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    return figure


def draw_classes(together: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw how well test classes were recognised: a confusion matrix, or the hardest classes if there are many.

    Args:
        together: see ``confusion_counts``.
        predicted: see ``confusion_counts``.
        names: of all test classes.
    """
    seen = np.flatnonzero(together.diagonal())
    if len(seen) <= MATRIX:
        return draw_confusion(together, predicted, names, seen)
    accuracies = 100 * predicted.diagonal() / together.diagonal().clip(1)
    order = seen[np.argsort(accuracies[seen], kind="stable")]
    rows = order[:HARDEST].tolist()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(CARD, 0.22 * len(rows) + 3.2), layout="constrained")
        hardest, all_ = figure.subplots(2, 1, height_ratios=(0.22 * len(rows) + 0.6, 1.6))
        hardest.barh(range(len(rows)), accuracies[rows], color=COLOURS[5])
        for row, number in enumerate(rows):
            others = np.where(np.arange(len(names)) == number, -1, predicted[number])
            rival = names[int(others.argmax())] if others.max() > 0 else ""
            hardest.text(2, row, for_figure(cut(rival, NAME)), va="center", fontsize=8)
        hardest.set_yticks(range(len(rows)), [for_figure(cut(names[number], NAME)) for number in rows], fontsize=8)
        hardest.set(xlabel="accuracy, %", xlim=(0, 100))
        figure.suptitle("The hardest test classes, each with its most frequent mistake", fontsize=9)
        hardest.set_ylim(len(rows) - 0.4, -0.6)
        all_.plot(range(1, len(order) + 1), accuracies[order], color=COLOURS[0])
        all_.set(xlabel=f"all {len(order)} test classes, hardest first", ylabel="accuracy, %", ylim=(0, 103))
    return figure


def draw_confusion(
    together: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str], classes: NDArray[np.int64]
) -> Figure:
    """Draw how often queries of one class were answered with another, relative to episodes that contained both.

    Pairs of classes that were never in the same episode are left blank.

    Args:
        together: see ``confusion_counts``.
        predicted: see ``confusion_counts``.
        names: of all classes.
        classes: indices of the classes to draw, in order.
    """
    shares = np.divide(predicted, together, out=np.full(together.shape, np.nan), where=together > 0)
    shares = shares[np.ix_(classes, classes)]
    labels = [for_figure(cut(names[number], NAME)) for number in classes]
    side = max(0.24 * len(classes) + 2.4, 4.2)  # room for the label of the colours
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set(xlabel="answered", ylabel="class of the query")
        axes.grid(False)
        figure.colorbar(image, shrink=0.7, label="share of queries with both in the episode")
    return figure


def _frame(axes: Axes, corner: tuple[int, int], side: int, gap: int, label: int, answer: int) -> None:
    """Frame a query, with a colour and width that show whether the answer is right; show a wrong answer next to it."""
    wrong = answer != label
    x, y = corner[0] - gap / 2, corner[1] - gap / 2
    colour = COLOURS[1] if wrong else COLOURS[2]
    axes.add_patch(
        Rectangle((x, y), side + gap, side + gap, fill=False, edgecolor=colour, linewidth=3.5 if wrong else 0.8)
    )
    if wrong:
        box = {"boxstyle": "square,pad=0.1", "facecolor": colour, "edgecolor": "none"}
        axes.text(x, y, str(answer + 1), color="white", fontsize=9, ha="left", va="top", bbox=box)
