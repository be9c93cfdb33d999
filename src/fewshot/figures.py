"""The project's figures, in one style; ``src/figure.py`` draws each."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from fewshot.errors import FewShotError

# Told apart in grey by line style and marker, and by the colour-blind (Okabe & Ito's palette).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
}


def attention_bound(scales: Sequence[float], out: Path) -> list[Path]:
    """Draw how much attention one of ``way`` support samples can get from a softmax over scaled cosines.

    With the cosine times s in [-s, s], the largest weight is e^s / (e^s + (way - 1) e^-s): for s = 1 the bound
    e / (e + (way - 1) / e) of plain matching networks. An encoder that ends in a ReLU, as Conv4 does, has cosines
    in [0, 1] only, and reaches e^s / (e^s + way - 1).

    Args:
        scales: the factors s, a curve each.
        out: an existing folder.

    Returns:
        The file written.
    """
    ways = np.arange(2, 51)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, spread, title in zip(
            panels, (2, 1), ("cosine in [−1, 1]", "cosine in [0, 1], after a ReLU"), strict=True
        ):
            for scale, colour, line, marker in zip(scales, cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False):
                bound = 1 / (1 + (ways - 1) * np.exp(-spread * scale))
                label = "plain cosine" if scale == 1 else f"cosine × {scale:g}"
                axes.plot(ways, bound, line, color=colour, marker=marker, markevery=8, markersize=4, label=label)
            axes.set(title=title, xlabel="way", ylim=(0, 1.03), xlim=(2, 50))
        panels[0].set_ylabel("largest attention on one support sample")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return [_save(figure, out / "attention_bound.png")]


def distance_study(runs: str, out: Path) -> list[Path]:
    """Draw validation accuracy against training episodes by distance, and write a table of the test accuracies.

    Runs that differ only in their seed make one line, the mean, with a band from the worst to the best.

    Args:
        runs: a folder with ``results.json`` files anywhere below it.
        out: an existing folder.

    Returns:
        The files written: a figure and a Markdown table.

    Raises:
        FewShotError: there are no results.
    """
    groups: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(Path(runs).expanduser().rglob("results.json")):
        results = json.loads(path.read_text())
        groups[results["way"]][_distance(results)].append(results)
    if not groups:
        raise FewShotError(f"no results.json lies below {runs}; run the study first, or name its folder with runs=PATH")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(groups), 4), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (way, lines) in zip(panels, sorted(groups.items()), strict=True):
            for (label, seeds), colour, marker, line in zip(
                sorted(lines.items(), key=_order), cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False
            ):
                steps = [validation["trained_episodes"] for validation in seeds[0]["validations"]]
                curves = np.array([[100 * v["accuracy"] for v in of["validations"]] for of in seeds])
                axes.plot(steps, curves.mean(0), line, color=colour, marker=marker, markersize=4, label=label)
                axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(title=f"{way}-way {seeds[0]['shot']}-shot", xlabel="training episodes")
        panels[0].set_ylabel("validation accuracy, %")
        panels[0].legend(loc="lower right")
    table = out / "distance_study.md"
    table.write_text(_table(groups))
    return [_save(figure, out / "distance_study.png"), table]


def _distance(results: Mapping[str, Any]) -> str:
    distance = results["config"]["distance"]
    if results["distance"] != "scaled_cosine":
        return str(results["distance"])
    return f"cosine × {distance['scale']:g}" + (", learnt from there" if distance["learn"] else "")


def _order(entry: tuple[str, Any]) -> tuple[bool, int, str]:
    return entry[0] != "l2", len(entry[0]), entry[0]


def _table(groups: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    rows = ["| way | distance | training episodes | test accuracy of each seed, % |", "| --- | --- | --- | --- |"]
    for way, lines in sorted(groups.items()):
        for label, seeds in sorted(lines.items(), key=_order):
            cells = ", ".join(f"{100 * of['accuracy']:.2f} ± {100 * of['ci95']:.2f}" for of in seeds)
            rows.append(f"| {way} | {label} | {seeds[0]['config']['train']['episodes']:,} | {cells} |")
    return "\n".join(rows) + "\n"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def autograd_graph(tensor: torch.Tensor) -> tuple[list[Any], list[tuple[int, int]]]:
    """Walk the graph through which autograd would differentiate ``tensor``.

    Args:
        tensor: a result with a graph behind it.

    Returns:
        The nodes, each before those it leads back to where it is found first, and the edges by their positions.
    """
    nodes: list[Any] = [tensor.grad_fn]
    positions = {tensor.grad_fn: 0}
    edges = []
    for position, node in enumerate(nodes):
        for earlier, _ in node.next_functions:
            if earlier is None:
                continue
            if earlier not in positions:
                positions[earlier] = len(nodes)
                nodes.append(earlier)
            edges.append((position, positions[earlier]))
    return nodes, edges
