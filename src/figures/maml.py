"""Figures of MAML: its autograd graphs and its adaptation."""

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
from numpy.typing import NDArray

from benchmarks.contest import Contest, Entrant, run
from benchmarks.maml import TASK_KEYS, make_maml, make_tasks, ours
from fewshot.autograd import autograd_graph, is_double_backward
from fewshot.data.episodes import Episode
from fewshot.errors import FewShotError
from fewshot.methods.base import FewShotMethod
from fewshot.methods.maml import MAML, total_cross_entropy
from fewshot.results import find_results, is_evaluation
from fewshot.style import COLOURS, LINES, MARKERS, STYLE, WIDTH
from fewshot.text import cut, for_figure
from fewshot.training import make_method
from figures.shared import find_episode, open_run, save


def maml_graph(task: Mapping[str, Any], steps: Sequence[int], out: Path) -> list[Path]:
    """Draw the autograd graph of one task's meta-step, first and second order, and peak memory against inner steps.

    Args:
        task: settings of a meta-step, as in ``benchmarks.maml``; the graph is drawn for one inner step.
        steps: numbers of inner steps to measure memory for; each starts a process.
        out: an existing directory.

    Returns:
        The file written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5), layout="constrained")
        first, second, memory = figure.subplots(1, 3, width_ratios=(1, 1.8, 1.2))
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
        shape = f"{task['way']}-way {task['shot']}-shot, {task['query']} queries, {task['size']}x{task['size']}"
        figure.suptitle(f"Autograd graph of a meta-step of MAML with one inner step ({shape})", fontsize=11)
        memory.set(title="peak memory", xlabel="inner steps", ylabel="MiB", ylim=(0, None))
        memory.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=8)
    return [save(figure, out / "maml_graph.png")]


def adaptation(runs: str, steps: int, episodes: int, out: Path) -> list[Path]:
    """Draw how MAML improves on test tasks with each inner step, compared with an untrained network.

    Args:
        runs: a directory with runs of MAML anywhere below it; each becomes a curve.
        steps: largest number of inner steps.
        episodes: number of test tasks to average over, with 95% intervals.
        out: an existing directory.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no run of MAML, or a number is too small.
    """
    if steps < 1 or episodes < 2:
        raise FewShotError(f"figure.steps={steps} must be at least 1, and figure.episodes={episodes} at least 2")
    found = {
        path.parent: result
        for path, result in find_results([Path(runs).expanduser()]).items()
        if result["method"] == "maml" and not is_evaluation(result)
    }
    if not found:
        raise FewShotError(f"no run of method=maml below {runs}; specify the directory of one with runs=PATH")
    curves: dict[str, tuple[int | None, NDArray[np.float64]]] = {}
    for run_dir in found:
        trained, data = open_run(str(run_dir))
        tasks = [find_episode(data, number).load(data.images) for number in range(episodes)]
        if not curves:
            curves["before training"] = None, _adapted(make_method(trained.config), tasks, steps)
        settings = trained.config.method
        label = for_figure(cut(f"{'second' if settings.order == 2 else 'first'} order, {run_dir.name}", 36))
        curves[label] = settings.inner_steps, _adapted(trained.method, tasks, steps)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for (label, (trained_at, values)), colour, line, marker in zip(
            curves.items(), cycle((COLOURS[4], *COLOURS[:4])), cycle((LINES[-1], *LINES[:-1])), cycle(MARKERS)
        ):
            means_, halves = values.mean(0), 1.96 * values.std(0, ddof=1) / episodes**0.5
            for axes, mean, half in zip(panels, means_, halves, strict=True):
                taken = np.arange(steps + 1)
                axes.plot(taken, mean, line, color=colour, marker=marker, markersize=5, label=label)
                axes.fill_between(taken, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
                if trained_at is not None and trained_at <= steps:
                    axes.plot(trained_at, mean[trained_at], "o", color=colour, markersize=12, fillstyle="none")
        way, shot = trained.config.way, trained.config.shot
        panels[0].set(ylabel="accuracy, %", ylim=(0, 103), title="queries, answered right")
        panels[0].axhline(100 / way, color="#777777", linewidth=1)
        panels[0].annotate("guessing", (steps, 100 / way), (0, -3), textcoords="offset points", ha="right", va="top")
        panels[1].set(ylabel="cross-entropy", title="queries, loss", yscale="log")
        for axes in panels:
            axes.set(xlabel="inner steps on the support set (circled: as trained)")
        figure.suptitle(f"{episodes:,} test tasks of unseen classes, {way}-way {shot}-shot")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return [save(figure, out / "adaptation.png")]


def _adapted(method: FewShotMethod, tasks: Sequence[Episode], steps: int) -> NDArray[np.float64]:
    """Compute accuracy in % and loss of each task's queries after each number of steps: ``[tasks, 2, steps + 1]``."""
    assert isinstance(method, MAML)
    values = np.empty((len(tasks), 2, steps + 1))
    for task, (accuracies, losses) in zip(tasks, values, strict=True):
        weights = method.weights()
        for step in range(steps + 1):
            with torch.no_grad():
                logits = method.classify(weights, task.query)
                accuracies[step] = 100 * (logits.argmax(1) == task.query_labels).double().mean()
                losses[step] = total_cross_entropy(logits, task.query_labels)
            weights = method.adapt(weights, task.support, task.support_labels, 1)
    return values


def _draw_graph(axes: Axes, tensor: torch.Tensor, title: str) -> None:
    """Draw the nodes in columns, see ``_columns``, and the path through the inner step in colour."""
    nodes, edges = autograd_graph(tensor)
    kinds = [_kind(node.name()) for node in nodes]
    columns = _columns(kinds, edges)
    x, y = _places(columns, edges)
    ends = np.array(edges)
    # Edges into the inner step come from the updates, and those out of it go to the weights.
    through = np.array([columns[earlier] in {GRADIENT, SUPPORT} for _, earlier in edges])
    for chosen, colour, width in ((~through, "#aaaaaa", 0.4), (through, COLOURS[6], 1.2)):
        if chosen.any():
            axes.plot(x[ends[chosen]].T, y[ends[chosen]].T, color=colour, linewidth=width, zorder=1)
    for kind, colour, marker in (
        ("forward operation", COLOURS[0], "o"),
        ("derivative of a gradient", COLOURS[1], "^"),
        ("parameter", COLOURS[4], "s"),
    ):
        members = [position for position, other in enumerate(kinds) if other == kind]
        label = f"{kind}: {len(members)}"
        axes.scatter(x[members], y[members], s=12, color=colour, marker=marker, zorder=2, label=label)
    if through.any():
        axes.plot([], [], color=COLOURS[6], linewidth=1.2, label="through the inner step")
    used = sorted(set(columns))
    axes.set(title=f"{title}: {len(nodes)} nodes", yticks=[], ylim=(-0.04, 1.06), xlim=(-0.5, len(used) - 0.5))
    axes.set_xticks(range(len(used)), [COLUMNS[column] for column in used], fontsize=7)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), fontsize=8)


QUERIES, UPDATE, GRADIENT, SUPPORT, PARAMETERS = range(5)
COLUMNS = ("queries", "updated\nweights", "inner\ngradient", "support\nset", "weights")


def _columns(kinds: Sequence[str], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Sort the nodes of a meta-step's graph into columns, from the loss to the weights.

    They are the forward pass on the queries, the updates of the weights, the backward pass of the inner step, the
    forward pass on the support set (both only if the graph is of second order), and the weights.
    """
    earlier_of: dict[int, list[int]] = {position: [] for position in range(len(kinds))}
    for later, earlier in edges:
        earlier_of[later].append(earlier)
    order = _from_the_loss_down(len(kinds), edges)
    to_gradient: set[int] = set()  # nodes that depend on a derivative of a gradient
    for position in reversed(order):
        if kinds[position] == "derivative of a gradient" or to_gradient.intersection(earlier_of[position]):
            to_gradient.add(position)
    at_weights = {later for later, earlier in edges if kinds[earlier] == "parameter"}
    updates = {position for position in at_weights if not to_gradient or position in to_gradient}
    updates -= {position for position in updates if kinds[position] == "derivative of a gradient"}
    below: set[int] = set()
    for position in order:
        if position in updates or position in below:
            below.update(earlier_of[position])
    columns = []
    for position, kind in enumerate(kinds):
        if kind == "parameter":
            columns.append(PARAMETERS)
        elif position in updates:
            columns.append(UPDATE)
        elif position in below:
            columns.append(GRADIENT if position in to_gradient else SUPPORT)
        else:
            columns.append(QUERIES)
    return columns


def _places(
    columns: Sequence[int], edges: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Place the nodes so that each forward pass goes up to its loss, and layers of the network are level."""
    order = _from_the_loss_down(len(columns), edges)
    within = [(later, earlier) for later, earlier in edges if columns[later] == columns[earlier]]
    above = _longest_paths(order, within)
    below = _longest_paths(order[::-1], [(earlier, later) for later, earlier in within])
    used = sorted(set(columns))
    place = np.array(columns)
    x, y = np.array([used.index(column) for column in columns], dtype=np.float64), np.zeros(len(columns))
    for column in (QUERIES, GRADIENT, SUPPORT):
        here = place == column
        if here.any():
            # Differentiated, a backward pass ends at its loss, where a forward pass begins.
            length = (below if column == GRADIENT else above)[here]
            y[here] = 1 - length / max(length.max(), 1)
    for column in (UPDATE, PARAMETERS):  # level with the nodes that they are connected to, evenly spaced
        near = {position: [0.0] for position in np.flatnonzero(place == column).tolist()}
        for later, earlier in edges:
            for own, other in ((later, earlier), (earlier, later)):
                if place[own] == column and place[other] not in (UPDATE if column == UPDATE else QUERIES, PARAMETERS):
                    near[own].append(y[other])
        for rank, position in enumerate(sorted(near, key=lambda node: float(np.mean(near[node])))):
            y[position] = rank / max(len(near) - 1, 1)
    for key in {(column, level) for column, level in zip(columns, y.round(6), strict=True)}:  # side by side
        members = [position for position in range(len(columns)) if (columns[position], y[position].round(6)) == key]
        x[members] += 0.16 * (np.arange(len(members)) - (len(members) - 1) / 2)
    return x, y


def _longest_paths(order: Sequence[int], edges: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Return the length of the longest path to each node, along edges that follow the order."""
    lengths = np.zeros(len(order))
    for position in order:
        for start, end in edges:
            if start == position:
                lengths[end] = max(lengths[end], lengths[start] + 1)
    return lengths


def _from_the_loss_down(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Sort the nodes so that each comes after all of its predecessors."""
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(count), ()))
    for later, earlier in edges:
        sorter.add(earlier, later)
    return list(sorter.static_order())


def _kind(name: str) -> str:
    if "AccumulateGrad" in name:
        return "parameter"
    return "derivative of a gradient" if is_double_backward(name) else "forward operation"
