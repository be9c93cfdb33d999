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
from fewshot.style import COLOURS, LINES, MARKERS, STYLE
from fewshot.text import for_figure
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
        shape = f"{task['way']}-way {task['shot']}-shot, {task['query']} queries, {task['size']}x{task['size']}"
        figure.suptitle(f"A meta-step of MAML, one inner step, as autograd sees it; and memory of more steps ({shape})")
        memory.set(title="peak memory", xlabel="inner steps", ylabel="MiB", ylim=(0, None))
        memory.legend()
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
        label = for_figure(f"{'second' if settings.order == 2 else 'first'} order, {run_dir.name}")
        curves[label] = settings.inner_steps, _adapted(trained.method, tasks, steps)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
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
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
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
    """Draw nodes by their distance from the loss at the top, each near the middle of its predecessors."""
    nodes, edges = autograd_graph(tensor)
    depth, weight = [0] * len(nodes), np.zeros(len(nodes))
    for position in _from_the_loss_down(len(nodes), edges):
        for later, earlier in edges:
            if later == position:
                depth[earlier] = max(depth[earlier], depth[later] + 1)
    x, level_of = np.zeros(len(nodes)), np.array(depth)
    for level in range(max(depth) + 1):
        here = np.flatnonzero(level_of == level)
        for position in here.tolist():
            above = [x[later] for later, earlier in edges if earlier == position]
            weight[position] = np.mean(above) if above else 0
        order = here[np.argsort(weight[here], kind="stable")]
        x[order] = np.arange(len(order)) - (len(order) - 1) / 2
    ends = np.array(edges)
    axes.plot(x[ends].T, -level_of[ends].T, color="#999999", linewidth=0.3, zorder=1)
    kinds = [_kind(node.name()) for node in nodes]
    for kind, colour, marker in (
        ("forward operation", COLOURS[0], "o"),
        ("derivative of a gradient", COLOURS[1], "^"),
        ("parameter", COLOURS[4], "s"),
    ):
        members = [position for position, other in enumerate(kinds) if other == kind]
        axes.scatter(
            x[members],
            -level_of[members],
            s=14,
            color=colour,
            marker=marker,
            zorder=2,
            label=f"{kind}: {len(members)}",
        )
    axes.set(title=f"{title}: {len(nodes)} nodes", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=9)


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
