"""The project's figures, in one style; ``src/figure.py`` draws each."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.benchmarks.contest import Contest, Entrant, run
from fewshot.benchmarks.maml import TASK, TASK_KEYS, make_maml, make_tasks, ours
from fewshot.benchmarks.profile import KINDS_AND_ELSE, convolution_peak, profile_step
from fewshot.benchmarks.training import MINIIMAGENET, OMNIGLOT, bare_loop
from fewshot.errors import FewShotError
from fewshot.hardware import keep_freed_memory
from fewshot.methods.maml import total_cross_entropy
from fewshot.results import Result, by_settings, read_results
from fewshot.style import COLOURS, LINES, MARKERS, STYLE


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
        FewShotError: there are no results of methods with a distance.
    """
    groups: dict[int, list[tuple[str, list[Result]]]] = defaultdict(list)
    for seeds in by_settings(read_results(runs)):
        if seeds[0].get("distance") is not None:
            groups[seeds[0]["way"]].append((_distance(seeds[0]), seeds))
    if not groups:
        raise FewShotError(f"no run below {runs} compares by a distance; name the folder of the study: runs=PATH")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.5 * len(groups) + 2.5, 4), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axes, (way, lines) in zip(panels, sorted(groups.items()), strict=True):
            for (label, seeds), colour, marker, line in zip(
                sorted(lines, key=_order), cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False
            ):
                steps = [validation["trained_episodes"] for validation in seeds[0]["validations"]]
                curves = np.array([[100 * v["accuracy"] for v in of["validations"]] for of in seeds])
                axes.plot(steps, curves.mean(0), line, color=colour, marker=marker, markersize=4, label=label)
                axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(title=f"{way}-way {seeds[0]['shot']}-shot", xlabel="training episodes")
        panels[0].set_ylabel("validation accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    table = out / "distance_study.md"
    table.write_text(_table(groups))
    return [_save(figure, out / "distance_study.png"), table]


def maml_graph(task: Mapping[str, Any], steps: Sequence[int], out: Path) -> list[Path]:
    """Draw the autograd graph of one task's meta-step, first and second order, and peak memory against inner steps.

    Args:
        task: of one meta-step, as ``fewshot.benchmarks.maml`` takes it; its graph is drawn for one inner step.
        steps: the numbers of inner steps to measure memory at; each one starts a process.
        out: an existing folder.

    Returns:
        The file written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 6.5), layout="constrained")
        first, second, memory = figure.subplots(1, 3, width_ratios=(1, 2.2, 1.3))
        for axes, order in ((first, 1), (second, 2)):
            method = make_maml(order, "loop", {**task, "steps": 1})
            episode = next(make_tasks(**{key: task[key] for key in TASK_KEYS}).tasks())
            loss = total_cross_entropy(method.solve(episode), episode.query_labels)
            _draw_graph(axes, loss, "first order" if order == 1 else "second order")
        for (label, order, recompute), colour, line, marker in zip(
            (("first order", 1, False), ("second order", 2, False), ("second order, recompute", 2, True)),
            COLOURS,
            LINES,
            MARKERS,
            strict=False,
        ):
            peaks = []
            for number in steps:
                settings = {"order": order, "batching": "loop", "task": {**task, "steps": number}}
                entrant = Entrant(label, ours, {**settings, "recompute": recompute})
                peaks.append(run(Contest(f"{label}, {number} steps", [entrant]), rounds=1)[0]["peak_bytes"] / 2**20)
            memory.plot(steps, peaks, line, color=colour, marker=marker, label=label)
        make = f"{task['way']}-way {task['shot']}-shot, {task['query']} queries, {task['size']}x{task['size']}"
        figure.suptitle(f"A meta-step of MAML, one inner step, as autograd sees it; and what more steps take ({make})")
        memory.set(title="peak memory", xlabel="inner steps", ylabel="MiB", ylim=(0, None))
        memory.legend()
    return [_save(figure, out / "maml_graph.png")]


def time_profile(rounds: int, out: Path) -> list[Path]:
    """Draw where the time of a training step goes, and what its arithmetic would take at this processor's peak.

    The peak is that of a large convolution, measured here and now with all threads.

    Args:
        rounds: how often each thing is timed; the median counts.
        out: an existing folder.

    Returns:
        The file written.
    """
    keep_freed_memory()
    peak = convolution_peak(rounds)
    steps = {
        "prototypical networks, Omniglot\n60-way 1-shot 5 queries": bare_loop({**OMNIGLOT, "steps": 1}),
        "prototypical networks, miniImageNet\n20-way 5-shot 15 queries": bare_loop({**MINIIMAGENET, "steps": 1}),
        "MAML, second order, a loop over tasks\n32 tasks, 5-way 1-shot 1 query": ours(2, "loop", TASK),
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        axes = figure.subplots()
        profiles = {name: profile_step(step, rounds) for name, step in steps.items()}
        labels, left = list(profiles), np.zeros(len(profiles))
        for kind, colour, hatch in zip(KINDS_AND_ELSE, COLOURS, ("", "//", "..", "\\\\", "xx", "--", ""), strict=True):
            widths = np.array([100 * of.shares[kind] for of in profiles.values()])
            axes.barh(labels, widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=kind)
            left += widths
        for row, of in enumerate(profiles.values()):
            bound = 100 * of.flops / peak / of.seconds
            axes.plot([bound, bound], [row - 0.47, row + 0.47], color="black", linewidth=2.5, zorder=3)
            told = f"{1e3 * of.seconds:,.0f} ms, {bound:.0f}% of the peak"
            axes.text(101, row, told, va="center", fontsize=9)
        axes.plot([], [], color="black", linewidth=2.5, label="all arithmetic at the peak")
        axes.set(xlabel="share of the time of a step, %", xlim=(0, 100))
        axes.invert_yaxis()
        axes.grid(False)
        figure.suptitle(f"A training step beside the measured convolution peak, {peak / 1e9:.0f} GFLOP/s")
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return [_save(figure, out / "time_profile.png")]


def _draw_graph(axes: Axes, tensor: torch.Tensor, title: str) -> None:
    """Nodes by their distance from the loss at the top, each near the middle of those that lead to it."""
    nodes, edges = autograd_graph(tensor)
    depth, weight = [0] * len(nodes), np.zeros(len(nodes))
    for position in _from_the_loss_down(len(nodes), edges):
        for later, earlier in edges:
            if later == position:
                depth[earlier] = max(depth[earlier], depth[later] + 1)
    place, level_of = np.zeros(len(nodes)), np.array(depth)
    for level in range(max(depth) + 1):
        here = np.flatnonzero(level_of == level)
        for position in here.tolist():
            above = [place[later] for later, earlier in edges if earlier == position]
            weight[position] = np.mean(above) if above else 0
        order = here[np.argsort(weight[here], kind="stable")]
        place[order] = np.arange(len(order)) - (len(order) - 1) / 2
    ends = np.array(edges)
    axes.plot(place[ends].T, -level_of[ends].T, color="#999999", linewidth=0.3, zorder=1)
    kinds = [_kind(node.name()) for node in nodes]
    for kind, colour, marker in (
        ("forward operation", COLOURS[0], "o"),
        ("derivative of a gradient", COLOURS[1], "^"),
        ("parameter", COLOURS[4], "s"),
    ):
        of_kind = [position for position, other in enumerate(kinds) if other == kind]
        axes.scatter(
            place[of_kind],
            -level_of[of_kind],
            s=14,
            color=colour,
            marker=marker,
            zorder=2,
            label=f"{kind}: {len(of_kind)}",
        )
    axes.set(title=f"{title}: {len(nodes)} nodes", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=9)


def _from_the_loss_down(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The nodes in an order in which each comes after all that lead to it."""
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(count), ()))
    for later, earlier in edges:
        sorter.add(earlier, later)
    return list(sorter.static_order())


def _kind(name: str) -> str:
    if "AccumulateGrad" in name:
        return "parameter"
    return "derivative of a gradient" if is_double_backward(name) else "forward operation"


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


def is_double_backward(name: str) -> bool:
    """Whether a node's name says that it differentiates an operation that is itself a gradient."""
    return "Backward" in name.rstrip("0123456789").removesuffix("Backward")


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
            cells = ", ".join(f"{100 * of['accuracy']:.2f} ± {100 * of['ci95']:.2f}" for of in seeds)
            rows.append(f"| {way} | {label} | {seeds[0]['config']['train']['episodes']:,} | {cells} |")
    return "\n".join(rows) + "\n"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
