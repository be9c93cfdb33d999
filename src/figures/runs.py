"""Figures of a trained run: an episode it solves, the spread of its accuracy, the plane of its prototypes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from numpy.typing import NDArray

from fewshot.checks import Count
from fewshot.data.episodes import EmbeddedEpisode, Episode, classes_of
from fewshot.distances import l2
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate_split
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.methods.protonet import prototypes as class_means
from fewshot.pictures import draw_episode
from fewshot.style import COLOURS, MARKERS, STYLE, WIDTH
from fewshot.text import cut, for_figure
from fewshot.training import make_method
from figures.shared import find_episode, open_run, save


def episode(run: str | None, number: int, out: Path) -> list[Path]:
    """Draw a test episode, of classes unseen in training, as a trained method solves it.

    Args:
        run: the directory of the training.
        number: number of the test episode.
        out: an existing directory.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no such run or episode.
    """
    trained, data = open_run(run)
    positions = find_episode(data, number)
    with torch.no_grad():
        answers = trained.method(positions.load(data.images)).argmax(1).numpy()
    return [save(draw_episode(data.bank, positions, answers), out / "episode.png")]


def intervals(run: str | None, episodes: int, out: Path) -> list[Path]:
    """Draw how much the accuracy varies between test episodes, and how its mean converges.

    Args:
        run: the directory of a training.
        episodes: number of episodes to solve.
        out: an existing directory.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no such run, or ``episodes`` is too small.
    """
    if episodes < 2:
        raise FewShotError(f"figure.episodes={episodes} must be at least 2: an interval needs two")
    trained, _ = open_run(run)
    trained.config.test.episodes, trained.config.run_dir = episodes, str(out)
    evaluation = evaluate_split(trained, trained.config)
    queries = len(evaluation.data.datasets["test"].query_labels)
    accuracies = 100 * evaluation.correct / queries
    counts = np.arange(2, episodes + 1)
    sums, squares = np.cumsum(accuracies)[1:], np.cumsum(accuracies**2)[1:]
    means_, spreads = sums / counts, np.sqrt(np.maximum(squares - sums**2 / counts, 0) / (counts - 1))
    halves = 1.96 * spreads / np.sqrt(counts)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        spread, settling = figure.subplots(1, 2, width_ratios=(1, 1.4))
        found, times = np.unique(accuracies, return_counts=True)
        spread.bar(found, times, width=75 / queries, color=COLOURS[5])
        spread.axvline(means_[-1], color=COLOURS[4], linewidth=2, label=f"mean, {means_[-1]:.2f}%")
        spread.set(title=f"each of {episodes:,} test episodes", xlabel="accuracy, %", ylabel="episodes")
        spread.legend(loc="upper left")
        settling.plot(counts, means_, color=COLOURS[0], label="mean so far")
        settling.fill_between(
            counts, means_ - halves, means_ + halves, color=COLOURS[0], alpha=0.2, linewidth=0, label="95% interval"
        )
        settling.axhline(means_[-1], color=COLOURS[4], linewidth=1)
        marked = [count for count in (10, 100, 1_000, 10_000) if count <= episodes] or [episodes]
        for count in marked:
            middle, half = means_[count - 2], halves[count - 2]
            settling.errorbar(count, middle, yerr=half, color=COLOURS[1], capsize=4, linewidth=2)
            settling.annotate(
                f"± {half:.2f}", (count, middle + half), (0, 4), textcoords="offset points", ha="center", va="bottom"
            )
        least, most = (means_ - halves)[marked[0] - 2], (means_ + halves)[marked[0] - 2]
        settling.set(title="the mean of the first of them", xlabel="test episodes", ylabel="accuracy, %", xscale="log")
        settling.set_ylim(least - 2, most + 3)
        settling.set_xlim(max(marked[0] / 2, 2), 1.5 * episodes)
        settling.legend(loc="lower right")
    return [save(figure, out / "intervals.png")]


def prototypes(run: str | None, way: int, shot: Count, query: Count, number: int, out: Path) -> list[Path]:
    """Draw the embeddings of a test episode before and after training, its prototypes, and their regions.

    The plane is spanned by the two principal axes of the prototypes, and the regions are those of the nearest prototype
    in it. Three prototypes span that plane, and the component outside it adds the same to the squared distance from
    each: the regions are then exactly those of the method. With more prototypes it is only a projection.

    Args:
        run: the directory of a training of prototypical networks.
        way: classes in the episode, 3 to 7.
        shot: support samples per class.
        query: queries per class.
        number: number of the test episode with that way, shot and query.
        out: an existing directory.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no such run or episode, or the run has a different method or distance.
    """
    if not 3 <= way <= len(MARKERS):
        raise FewShotError(f"figure.way={way} must be 3 to {len(MARKERS)}")
    trained, data = open_run(run, way=way, shot=shot, query=query)
    if not isinstance(trained.method, PrototypicalNetwork) or trained.config.choices.distance != "l2":
        raise FewShotError(f"{run} is not a run of method=protonet with distance=l2, whose regions this figure draws")
    positions = find_episode(data, number)
    names = [for_figure(cut(data.bank.names[number], 36)) for number in classes_of(positions, data.bank.offsets[:-1])]
    samples = [data.bank.images[positions.support[positions.support_labels == label][0]] for label in range(way)]
    untrained = make_method(trained.config).eval()
    assert isinstance(untrained, PrototypicalNetwork)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, method, when in zip(panels, (untrained, trained.method), ("before", "after"), strict=True):
            right = _draw_regions(axes, method, positions.load(data.images), samples, names)
            axes.set_title(f"{when} training: {right} of {way * query} queries right")
        for label, marker in (
            ("query", {"s": 28, "color": "#555555", "linewidths": 0}),
            ("support sample", {"s": 28, "facecolors": "none", "edgecolors": "#555555"}),
            ("prototype: mean of the support samples", {"s": 170, "facecolors": "#bbbbbb", "edgecolors": "black"}),
            ("query answered wrong", {"s": 75, "facecolors": "none", "edgecolors": "black"}),
        ):
            panels[0].scatter([], [], label=label, **marker)
        plane = "the plane through the prototypes" if way == 3 else "a projection on the prototypes' principal axes"
        figure.suptitle(f"Embeddings of {way} unseen classes, in {plane}\n", fontsize=12)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return [save(figure, out / "prototypes.png")]


def flattening(centres: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the projection on the plane of the two principal axes of some points.

    Args:
        centres: ``[points, features]``, three or more. Exactly three lie in the plane, and the squared distances of a
            point from them are those in the plane plus a constant.

    Returns:
        A function from ``[..., features]`` to ``[..., 2]``.
    """
    middle = centres.mean(0)
    axes = torch.linalg.svd(centres - middle, full_matrices=False).Vh[:2]
    return lambda points: (points - middle) @ axes.T


def _free_places(points: NDArray[Any], centres: NDArray[Any], side: float) -> list[tuple[float, float]]:
    """Find a place for a picture near each centre that covers no point and no other picture.

    Args:
        points: ``[points, 2]``.
        centres: ``[pictures, 2]``.
        side: half the width of the square panel, whose middle is that of the points.
    """
    middle = (points.max(0) + points.min(0)) / 2
    half = 0.13 * side  # of a picture and a margin
    taken = np.concatenate([points, centres])
    places: list[tuple[float, float]] = []
    for centre in centres:
        around = [
            centre + distance * side * np.array([np.cos(angle), np.sin(angle)])
            for distance in np.arange(0.15, 2, 0.05)
            for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ]
        inside = [place for place in around if (np.abs(place - middle) < side - half).all()]
        others = np.array(places).reshape(-1, 2)
        free = (
            place
            for place in inside
            if (np.abs(taken - place).max(1) > half).all() and (np.abs(others - place).max(1) > 2 * half).all()
        )
        x, y = next(free, inside[0])
        places.append((float(x), float(y)))
    return places


def _draw_regions(
    axes: Axes, method: PrototypicalNetwork, task: Episode, samples: Sequence[torch.Tensor], names: Sequence[str]
) -> int:
    """Draw a task's embeddings in the plane of its prototypes, with a sample per class; count the right answers."""
    with torch.no_grad():
        support, query = method.encoder(task.support), method.encoder(task.query)
        embedded = EmbeddedEpisode(support, task.support_labels, query, task.query_labels, task.way)
        wrong = method.compare(embedded).argmax(1) != task.query_labels
    centres = class_means(support, task.support_labels, task.way)
    flat = flattening(centres)
    support, query, centres = flat(support), flat(query), flat(centres)
    every = torch.cat([support, query])
    low, high = every.amin(0), every.amax(0)
    side = 0.55 * float((high - low).max())  # the same for both axes, since distances are compared
    x, y = (torch.linspace(float(middle) - side, float(middle) + side, 400) for middle in (low + high) / 2)
    nearest = l2(torch.cartesian_prod(x, y), centres).argmin(1).view(len(x), len(y)).T.numpy()
    colours = COLOURS[: task.way]
    axes.imshow(
        nearest,
        origin="lower",
        extent=(float(x[0]), float(x[-1]), float(y[0]), float(y[-1])),
        cmap=ListedColormap(colours),
        alpha=0.13,
        vmin=-0.5,
        vmax=task.way - 0.5,
    )
    for label, (name, colour, marker) in enumerate(zip(names, colours, MARKERS, strict=False)):
        axes.contour(x.numpy(), y.numpy(), nearest == label, levels=[0.5], colors="black", linewidths=0.7)
        in_class = task.query_labels == label
        queries, mistaken = query[in_class].T.numpy(), query[in_class & wrong].T.numpy()
        shots, centre = support[task.support_labels == label].T.numpy(), centres[label].tolist()
        axes.scatter(queries[0], queries[1], 28, color=colour, marker=marker, linewidths=0, label=name, zorder=3)
        axes.scatter(shots[0], shots[1], 28, marker=marker, facecolors="none", edgecolors=colour, zorder=2)
        axes.scatter(
            centre[0], centre[1], 170, color=colour, marker=marker, edgecolors="black", linewidths=1.5, zorder=5
        )
        axes.scatter(mistaken[0], mistaken[1], 90, facecolors="none", edgecolors="black", zorder=4)
    # Coordinates in the plane mean nothing, so there are no ticks.
    axes.set(xlim=(float(x[0]), float(x[-1])), ylim=(float(y[0]), float(y[-1])), xticks=[], yticks=[])
    axes.grid(False)
    places = _free_places(every.numpy(), centres.numpy(), side)
    for centre, place, sample, colour in zip(centres.tolist(), places, samples, colours, strict=True):
        pixels = np.broadcast_to(sample.numpy(), (*sample.shape[:2], 3))
        line = {"arrowstyle": "-", "color": "black", "linewidth": 0.7}
        frame = {"edgecolor": colour, "linewidth": 2}
        box = OffsetImage(pixels, zoom=18 / len(sample))
        axes.add_artist(AnnotationBbox(box, centre, place, pad=0.1, arrowprops=line, bboxprops=frame))
    return int((~wrong).sum())
