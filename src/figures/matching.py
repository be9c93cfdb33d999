"""Figures of matching networks and distances: the attention bound, and the distance study."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fewshot.errors import FewShotError
from fewshot.results import Result, by_settings, read_results
from fewshot.style import COLOURS, LINES, MARKERS, STYLE, WIDTH
from fewshot.text import for_figure, for_markdown
from figures.shared import save


def attention_bound(scales: Sequence[float], out: Path) -> list[Path]:
    """Draw the largest attention that a softmax over scaled cosines can give to one of ``way`` support samples.

    With the cosine times s in [-s, s], the largest weight is e^s / (e^s + (way - 1) e^-s): for s = 1 the bound
    e / (e + (way - 1) / e) of plain matching networks. The embeddings of an encoder that ends in a ReLU, like Conv4,
    have cosines in [0, 1] only, so that the largest weight is e^s / (e^s + way - 1).

    Args:
        scales: the factors s, one curve each.
        out: an existing directory.

    Returns:
        The file written.
    """
    ways = np.arange(2, 51)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
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
    return [save(figure, out / "attention_bound.png")]


def distance_study(runs: str, out: Path) -> list[Path]:
    """Draw validation accuracy against training episodes by distance, and write a table of the test accuracies.

    Runs that differ only in their seed become one line, their mean, with a band from the worst to the best.

    Args:
        runs: a directory with ``results.json`` files anywhere below it.
        out: an existing directory.

    Returns:
        The files written: a figure and a Markdown table.

    Raises:
        FewShotError: there are no results of methods with a distance.
    """
    groups: dict[int, list[tuple[str, list[Result]]]] = defaultdict(list)
    for seeds in by_settings(read_results(runs)):
        if seeds[0].get("distance") is not None:
            groups[seeds[0]["way"]].append((_distance(seeds[0]), seeds))
    if not groups:
        raise FewShotError(
            f"no run below {runs} has a method with a distance; specify the directory of the study with runs=PATH"
        )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (way, lines) in zip(panels, sorted(groups.items()), strict=True):
            for (label, seeds), colour, marker, line in zip(
                sorted(lines, key=_order), cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False
            ):
                steps = [validation["trained_episodes"] for validation in seeds[0]["validations"]]
                curves = np.array([[100 * v["accuracy"] for v in result["validations"]] for result in seeds])
                axes.plot(
                    steps, curves.mean(0), line, color=colour, marker=marker, markersize=4, label=for_figure(label)
                )
                axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(title=f"{way}-way {seeds[0]['shot']}-shot", xlabel="training episodes")
        panels[0].set_ylabel("validation accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    table = out / "distance_study.md"
    table.write_text(_table(groups), encoding="utf-8")
    return [save(figure, out / "distance_study.png"), table]


def _distance(results: Result) -> str:
    distance = results["config"].get("distance")
    if results["distance"] != "scaled_cosine" or not isinstance(distance, Mapping):
        return str(results["distance"])
    return f"cosine × {distance['scale']:g}" + (", learnt from there" if distance["learn"] else "")


def _order(entry: tuple[str, Any]) -> tuple[bool, int, str]:
    return entry[0] != "l2", len(entry[0]), entry[0]


def _table(groups: Mapping[int, Sequence[tuple[str, Sequence[Result]]]]) -> str:
    rows = ["| way | distance | training episodes | test accuracy of each seed, % |", "| --- | --- | --- | --- |"]
    for way, lines in sorted(groups.items()):
        for label, seeds in sorted(lines, key=_order):
            cells = ", ".join(f"{100 * result['accuracy']:.2f} ± {100 * result['ci95']:.2f}" for result in seeds)
            rows.append(f"| {way} | {for_markdown(label)} | {seeds[0]['config']['train']['episodes']:,} | {cells} |")
    return "\n".join(rows) + "\n"
