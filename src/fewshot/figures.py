"""The project's figures, in one style; ``src/figure.py`` draws each."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import cycle
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
from omegaconf import OmegaConf
from PIL import Image

from fewshot.benchmarks.contest import Contest, Entrant, run
from fewshot.benchmarks.maml import TASK, TASK_KEYS, make_maml, make_tasks, ours
from fewshot.benchmarks.profile import KINDS_AND_ELSE, convolution_peak, profile_step
from fewshot.benchmarks.training import MINIIMAGENET, OMNIGLOT, bare_loop
from fewshot.config import CONF
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import EmbeddedEpisode, Episode, EpisodeIndex, EpisodeNumber, classes_of
from fewshot.distances import l2
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate_split
from fewshot.hardware import keep_freed_memory
from fewshot.methods.base import FewShotMethod
from fewshot.methods.maml import MAML, total_cross_entropy
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.methods.protonet import prototypes as class_means
from fewshot.pictures import draw_episode
from fewshot.results import Result, by_settings, find_results, read_results
from fewshot.style import COLOURS, LINES, MARKERS, STYLE
from fewshot.text import for_figure, for_markdown
from fewshot.trained import Trained, load_trained
from fewshot.training import make_data, make_method


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
                axes.plot(
                    steps, curves.mean(0), line, color=colour, marker=marker, markersize=4, label=for_figure(label)
                )
                axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(title=f"{way}-way {seeds[0]['shot']}-shot", xlabel="training episodes")
        panels[0].set_ylabel("validation accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    table = out / "distance_study.md"
    table.write_text(_table(groups), encoding="utf-8")
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


def episode(run: str | None, number: int, out: Path) -> list[Path]:
    """Draw a test episode, its classes never seen in training, as a trained method solves it.

    Args:
        run: the directory of the training.
        number: of the episode, among those that the run was tested on.
        out: an existing folder.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no such run or episode.
    """
    trained, data = _open(run)
    positions = _test_episode(data, number)
    with torch.no_grad():
        answers = trained.method(positions.load(data.images)).argmax(1).numpy()
    return [_save(draw_episode(data.bank, positions, answers), out / "episode.png")]


def intervals(run: str | None, episodes: int, out: Path) -> list[Path]:
    """Draw how much the accuracy differs from test episode to test episode, and how the mean settles.

    Args:
        run: the directory of a training.
        episodes: how many to solve.
        out: an existing folder.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no such run, or too few episodes are asked for.
    """
    if episodes < 2:
        raise FewShotError(f"figure.episodes={episodes} must be at least 2: an interval needs two")
    trained, _ = _open(run)
    trained.config.test.episodes, trained.config.run_dir = episodes, str(out)
    evaluation = evaluate_split(trained, trained.config)
    queries = len(evaluation.data.datasets["test"].query_labels)
    accuracies = 100 * evaluation.right / queries
    counts = np.arange(2, episodes + 1)
    sums, squares = np.cumsum(accuracies)[1:], np.cumsum(accuracies**2)[1:]
    means_, spreads = sums / counts, np.sqrt(np.maximum(squares - sums**2 / counts, 0) / (counts - 1))
    halves = 1.96 * spreads / np.sqrt(counts)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
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
        told = [count for count in (10, 100, 1_000, 10_000) if count <= episodes] or [episodes]
        for count in told:
            middle, half = means_[count - 2], halves[count - 2]
            settling.errorbar(count, middle, yerr=half, color=COLOURS[1], capsize=4, linewidth=2)
            settling.annotate(
                f"± {half:.2f}", (count, middle + half), (0, 4), textcoords="offset points", ha="center", va="bottom"
            )
        least, most = (means_ - halves)[told[0] - 2], (means_ + halves)[told[0] - 2]
        settling.set(title="the mean of the first of them", xlabel="test episodes", ylabel="accuracy, %", xscale="log")
        settling.set_ylim(least - 2, most + 3)
        settling.set_xlim(max(told[0] / 2, 2), 1.5 * episodes)
        settling.legend(loc="lower right")
    return [_save(figure, out / "intervals.png")]


def prototypes(run: str | None, way: int, shot: int, query: int, number: int, out: Path) -> list[Path]:
    """Draw the embeddings of a test episode before and after training, its prototypes, and what is nearest to each.

    The plane is that of the two principal axes of the prototypes, and the regions are those of the nearest prototype in
    it. Three prototypes span that plane, and what lies outside of it adds the same to the squared distance from each:
    the regions are then those of the method, and nothing is lost. Of more prototypes it is a shadow.

    Args:
        run: the directory of a training of prototypical networks.
        way: classes in the episode, 3 to 7.
        shot: support samples a class.
        query: queries a class.
        number: of the episode among the test's of that make.
        out: an existing folder.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no such run or episode, or the run is of another method or distance.
    """
    if not 3 <= way <= len(MARKERS):
        raise FewShotError(f"figure.way={way} must be 3 to {len(MARKERS)}")
    trained, data = _open(run, way=way, shot=shot, query=query)
    if not isinstance(trained.method, PrototypicalNetwork) or trained.config.choices.distance != "l2":
        raise FewShotError(f"{run} is no run of method=protonet and distance=l2, whose regions this figure draws")
    positions = _test_episode(data, number)
    names = [for_figure(data.bank.names[of]) for of in classes_of(positions, data.bank.offsets[:-1])]
    samples = [data.bank.images[positions.support[positions.support_labels == label][0]] for label in range(way)]
    untrained = make_method(trained.config).eval()
    assert isinstance(untrained, PrototypicalNetwork)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, method, when in zip(panels, (untrained, trained.method), ("before", "after"), strict=True):
            right = _draw_regions(axes, method, positions.load(data.images), samples, names)
            axes.set_title(f"{when} training: {right} of {way * query} queries right")
        for label, marker in (
            ("support sample", {"s": 28, "facecolors": "none", "edgecolors": "#555555"}),
            ("prototype, the mean of those", {"s": 170, "facecolors": "#bbbbbb", "edgecolors": "black"}),
            ("query answered wrong", {"s": 75, "facecolors": "none", "edgecolors": "black"}),
        ):
            panels[0].scatter([], [], label=label, **marker)
        seen = (
            "the plane through the prototypes" if way == 3 else "the plane of the prototypes' principal axes, a shadow"
        )
        figure.suptitle(f"Embeddings of {way} unseen classes, in {seen}\n", fontsize=12)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return [_save(figure, out / "prototypes.png")]


def adaptation(runs: str, steps: int, episodes: int, out: Path) -> list[Path]:
    """Draw how MAML gets better at test tasks with each inner step, beside the network that nobody trained.

    Args:
        runs: a folder with runs of MAML anywhere below it, a curve each.
        steps: inner steps, at most.
        episodes: test tasks that the means are over, with their 95% intervals.
        out: an existing folder.

    Returns:
        The file written.

    Raises:
        FewShotError: there is no run of MAML, or a number is too small.
    """
    if steps < 1 or episodes < 2:
        raise FewShotError(f"figure.steps={steps} must be at least 1, and figure.episodes={episodes} at least 2")
    found = {path.parent: of for path, of in find_results([Path(runs).expanduser()]).items() if of["method"] == "maml"}
    if not found:
        raise FewShotError(f"no run of method=maml lies below {runs}; name the folder of one: runs=PATH")
    curves: dict[str, tuple[int | None, NDArray[np.float64]]] = {}
    for place in found:
        trained, data = _open(str(place))
        tasks = [_test_episode(data, number).load(data.images) for number in range(episodes)]
        if not curves:
            curves["before training"] = None, _adapted(make_method(trained.config), tasks, steps)
        settings = trained.config.method
        label = for_figure(f"{'second' if settings.order == 2 else 'first'} order, {place.name}")
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
    return [_save(figure, out / "adaptation.png")]


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


def _open(run: str | None, **task: int) -> tuple[Trained, EpisodeDataModule]:
    """A trained method, on the CPU, and the episodes of its data; of another make where ``task`` says so."""
    if run is None:
        raise FewShotError("no run is named; name the directory that a training left: run=RUN_DIR")
    trained = load_trained(run)
    trained.config.merge_with(task)
    trained.config.hardware = OmegaConf.load(CONF / "hardware" / "cpu.yaml")
    data = make_data(trained.config)
    data.setup()
    return trained, data


def _test_episode(data: EpisodeDataModule, number: int) -> EpisodeIndex:
    if number < 0:
        raise FewShotError(f"figure.number={number} must be at least 0")
    return data.datasets["test"][EpisodeNumber(0, number)]


def _adapted(method: FewShotMethod, tasks: Sequence[Episode], steps: int) -> NDArray[np.float64]:
    """Accuracy in % and loss of the queries of each task after each number of steps: ``[tasks, 2, steps + 1]``."""
    assert isinstance(method, MAML)
    values = np.empty((len(tasks), 2, steps + 1))
    for task, of_task in zip(tasks, values, strict=True):
        weights = method.weights()
        for step in range(steps + 1):
            with torch.no_grad():
                logits = method.classify(weights, task.query)
                of_task[0, step] = 100 * (logits.argmax(1) == task.query_labels).double().mean()
                of_task[1, step] = total_cross_entropy(logits, task.query_labels)
            weights = method.adapt(weights, task.support, task.support_labels, 1)
    return values


def _draw_regions(
    axes: Axes, method: PrototypicalNetwork, task: Episode, samples: Sequence[torch.Tensor], names: Sequence[str]
) -> int:
    """The embeddings of a task in the plane of its prototypes, each of which has a sample beside it; right answers."""
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
    x, y = (torch.linspace(float(of) - side, float(of) + side, 400) for of in (low + high) / 2)
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
    for label, (name, colour, marker, sample) in enumerate(zip(names, colours, MARKERS, samples, strict=False)):
        axes.contour(x.numpy(), y.numpy(), nearest == label, levels=[0.5], colors="black", linewidths=0.7)
        asked = task.query_labels == label
        own, mistaken = query[asked].T.numpy(), query[asked & wrong].T.numpy()
        given, (x_of, y_of) = support[task.support_labels == label].T.numpy(), centres[label].tolist()
        axes.scatter(own[0], own[1], 28, color=colour, marker=marker, linewidths=0, label=name, zorder=3)
        axes.scatter(given[0], given[1], 28, marker=marker, facecolors="none", edgecolors=colour, zorder=2)
        axes.scatter(x_of, y_of, 170, color=colour, marker=marker, edgecolors="black", linewidths=1.5, zorder=5)
        axes.scatter(mistaken[0], mistaken[1], 90, facecolors="none", edgecolors="black", zorder=4)
        pixels = np.broadcast_to(sample.numpy(), (*sample.shape[:2], 3))
        box = OffsetImage(pixels, zoom=18 / len(sample))
        axes.add_artist(AnnotationBbox(box, (x_of, y_of), (20, 20), boxcoords="offset points", pad=0.1))
    axes.grid(False)
    return int((~wrong).sum())


def flattening(centres: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The projection on the plane of the two principal axes of some points.

    Args:
        centres: ``[points, features]``, three or more. The plane goes through all of three, and a point's squared
            distances from those are what they are in the plane, plus one number.

    Returns:
        A function from ``[..., features]`` to ``[..., 2]``.
    """
    middle = centres.mean(0)
    axes = torch.linalg.svd(centres - middle, full_matrices=False).Vh[:2]
    return lambda points: (points - middle) @ axes.T


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
            rows.append(f"| {way} | {for_markdown(label)} | {seeds[0]['config']['train']['episodes']:,} | {cells} |")
    return "\n".join(rows) + "\n"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize()  # 256 colours look the same, and take half the space or less
    few.save(path, optimize=True)
    return path
