"""The report: the accuracies of papers and article, and ours beside them, as Markdown, as CSV and as figures."""

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.errors import FewShotError
from fewshot.results import Result, by_settings, read_results
from fewshot.style import COLOURS, STYLE

OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"
# Overrides that change neither what a cell is nor its result's worth; any other is told beside the budget.
HARMLESS = re.compile(
    r"[+~]*(experiment(/\w+)?|budget|seed|hardware|resume|(checkpoint|log)_every|(run|data|cache)_dir|hydra\..*)="
)
KNOWN = ("dataset", "method", "way", "shot", "published", "article")
OURS = ("ours", "ci95", "lowest", "highest", "seeds", "episodes")
HOW = ("budget", "train_episodes", "train_seconds", "machine")


@dataclass(frozen=True)
class Line:
    """A line of the report: what is known of one cell of the tables, or of runs that belong to none.

    Attributes:
        dataset: as a title.
        method: likewise.
        way: classes in an episode of the test.
        shot: support samples a class, likewise.
        experiment: the name below ``conf/experiment``; None: the runs are not of one.
        published: test accuracy in %, by the method's paper; None: not told.
        article: the same, by the article.
        runs: ours, one a seed, alike in all but that; none: not run.
    """

    dataset: str
    method: str
    way: int
    shot: int
    experiment: str | None
    published: float | None = None
    article: float | None = None
    runs: Sequence[Result] = ()

    @property
    def accuracies(self) -> list[float]:
        """Ours in %, of each seed."""
        return [100 * run["accuracy"] for run in self.runs]

    @property
    def ours(self) -> float | None:
        """Their mean; None: not run."""
        return mean(self.accuracies) if self.runs else None

    @property
    def ci95(self) -> float:
        """Half the width of the widest 95% interval of a seed, in percentage points.

        The seeds are tested on the same episodes, so the interval of their mean is not narrower by their number.
        """
        return max(100 * run["ci95"] for run in self.runs)

    @property
    def train_episodes(self) -> int:
        """Of each training."""
        return int(self.runs[0]["config"]["train"]["episodes"])

    @property
    def train_seconds(self) -> float:
        """Of one training, the mean."""
        return mean(run["train_seconds"] for run in self.runs)

    @property
    def budget(self) -> str:
        """The budget of the experiment, and the overrides that make it another one."""
        changes = [override for override in map(str, self.runs[0]["overrides"]) if not HARMLESS.match(override)]
        return ", ".join(filter(None, [self.runs[0].get("budget"), *changes]))

    @property
    def is_below(self) -> bool:
        """Whether ours is less than the article's."""
        return self.ours is not None and self.article is not None and self.ours < self.article

    @property
    def machine(self) -> str:
        """What the runs were made on, each machine once; empty where no run tells."""
        machines = [run.get("machine") or {} for run in self.runs]
        return "; ".join(dict.fromkeys(_machine(of) for of in machines if of))


def report(
    runs: str | Sequence[str],
    tables: Mapping[str, Any],
    sources: Mapping[str, str],
    out: str,
    readme: str | None,
) -> list[Path]:
    """Collect results and write the report.

    Args:
        runs: folders, or ``results.json`` files.
        tables: what ours is set beside, see ``conf/report.yaml``.
        sources: where that stands: ``published`` and ``article``.
        out: a folder, made if need be.
        readme: a Markdown file with a pair of markers, between which the tables of the cells that ran are written.

    Returns:
        The files written.

    Raises:
        FewShotError: there are no results, or no markers in ``readme``.
    """
    lines = collect(read_results(runs), tables)
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in ("report.md", "report.csv", "report.png", "curves.png")]
    written[0].write_text(f"# Results\n\n{markdown(lines, sources)}")
    written[1].write_text(as_csv(lines))
    titles = [table.title for table in tables.values()]
    draw([line for line in lines if line.dataset in titles], written[2])
    if not draw_curves(lines, written[3]):
        written.pop().unlink(missing_ok=True)  # of an earlier report
    if readme is not None:
        page = Path(readme).expanduser()
        ran = [line for line in lines if line.runs]
        refresh(page, markdown(ran, sources, os.path.relpath(folder, page.resolve().parent)))
        written.append(page)
    return written


def collect(results: Sequence[Result], tables: Mapping[str, Any]) -> list[Line]:
    """Sort results into the cells of the tables.

    Args:
        results: in any order; those that differ by their seed only share a line.
        tables: see ``conf/report.yaml``.

    Returns:
        For every cell at least one line, and one for each other setting; the last lines are of no cell.
    """
    groups = by_settings(results)
    lines = []
    for dataset, table in tables.items():
        for name, method in table.methods.items():
            for position, task in enumerate(table.cells):
                way, shot = map(int, re.findall(r"\d+", task))
                experiment = f"{dataset}/{name}_{task}"
                published, article = (told[position] if told else None for told in (method.published, method.article))
                cell = Line(table.title, method.title, way, shot, experiment, published, article)
                key = (experiment, dataset, way, shot)  # overrides may have made something else of it
                of_cell = [group for group in groups if _key(group[0]) == key]
                lines += [replace(cell, runs=group) for group in of_cell] or [cell]
                groups = [group for group in groups if group not in of_cell]
    for group in groups:
        run = group[0]
        method = " ".join(str(run[key]) for key in ("method", "distance") if run.get(key))
        dataset = f"Other runs on {run['dataset']}"
        lines.append(Line(dataset, method, run["way"], run["shot"], run.get("experiment"), runs=group))
    return lines


def markdown(lines: Sequence[Line], sources: Mapping[str, str], folder: str = "") -> str:
    """The report's tables, one a data set, and what their columns mean.

    Args:
        lines: of the report.
        sources: see ``report``.
        folder: that of the figures, as a link from where the text is to stand.
    """
    machines = list(dict.fromkeys(line.machine for line in lines if line.machine))
    text = []
    for dataset in dict.fromkeys(line.dataset for line in lines):
        text += [
            f"**{dataset}**",
            "",
            "| method | task | published | article | ours | seeds | test episodes | budget | training episodes "
            "| training time | machine |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for line in lines:
            if line.dataset == dataset:
                task = f"{line.way}-way {line.shot}-shot"
                cells = [line.method, task, _figure(line.published), _figure(line.article), *_ours(line, machines)]
                text.append(f"| {' | '.join(cells)} |")
        text.append("")
    text += [
        "Accuracy in % on test classes. *Ours* comes from the weights that were best on validation classes: the mean "
        "over the seeds, ± the 95% interval over test episodes of one training, the widest of them where there are "
        "several seeds (all are tested on the same episodes); beside their number the lowest and the highest. "
        "*Budget* says how far the training went: `paper`, as published, or `cpu`, what two cores do in under an hour, "
        "as the file of the experiment tells. For MAML a training episode is a task. Training time is that of one "
        "training, validation and test left out.",
        "",
        f"*Published*: {sources['published']}.",
        "",
        f"*Article*: {sources['article']}.",
        "",
        *(f"Machine {number}: {machine}.\n" for number, machine in enumerate(machines, 1)),
        f"![Accuracy of each cell: published, of the article, and ours]({Path(folder, 'report.png').as_posix()})",
        "",
    ]
    if any(line.is_below for line in lines):
        text += [
            "How the training went of the cells that are below the article. Lines: validation; points: the test, with "
            "its 95% interval, of the weights chosen; dotted: the article's test.",
            "",
            f"![Accuracy against training episodes, a panel a cell]({Path(folder, 'curves.png').as_posix()})",
            "",
        ]
    return "\n".join(text)


def as_csv(lines: Sequence[Line]) -> str:
    """The report as comma-separated values; accuracies in %, their intervals in percentage points."""
    text = StringIO()
    table = csv.DictWriter(text, [*KNOWN, *OURS, *HOW, "experiment"], lineterminator="\n")
    table.writeheader()
    for line in lines:
        row = {key: getattr(line, key) for key in (*KNOWN, "experiment")}
        if line.runs:
            row |= {key: getattr(line, key) for key in ("ours", "ci95", "budget", "machine")}
            row |= {"lowest": min(line.accuracies), "highest": max(line.accuracies)}
            row |= {"seeds": " ".join(str(run["seed"]) for run in line.runs), "episodes": line.runs[0]["episodes"]}
            row |= {"train_episodes": line.train_episodes, "train_seconds": round(line.train_seconds)}
        table.writerow(row)
    return text.getvalue()


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the accuracies of each cell side by side, a panel a data set; where we did not run, what others tell."""
    cells = [line for line in lines if line.published or line.article or line.runs]
    datasets = list(dict.fromkeys(line.dataset for line in cells))
    shown = [[line for line in cells if line.dataset == dataset] for dataset in datasets]
    with mpl.rc_context(STYLE):
        tallest = max(map(len, shown))
        figure = Figure(figsize=(7.5 * len(shown), 0.29 * tallest + 1.6), layout="constrained")
        for axes, of_dataset in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            _draw_panel(axes, of_dataset)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, lines: Sequence[Line]) -> None:
    for name, marker, colour, shift in (
        ("published", "s", COLOURS[4], -0.2),
        ("article", "^", COLOURS[1], 0.0),
        ("ours", "o", COLOURS[0], 0.2),
    ):
        told = [(row + shift, line) for row, line in enumerate(lines) if getattr(line, name) is not None]
        axes.errorbar(
            [max(100 - getattr(line, name), 0.01) for _, line in told],  # no error at all has no place on the axis
            [row for row, _ in told],
            xerr=[line.ci95 for _, line in told] if name == "ours" else None,
            fmt=marker,
            color=colour,
            markerfacecolor=colour if name == "ours" else "none",
            markersize=5,
            capsize=2,
            label="ours, with the 95% interval" if name == "ours" else name,
        )
    axes.set(xscale="log", xlabel="test accuracy, % (the scale is that of the error)", title=lines[0].dataset)
    axes.invert_xaxis()
    most, least = axes.get_xlim()
    ticks = [error for error in (70, 60, 50, 45, 40, 35, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.02) if least < error < most]
    axes.set_xticks(ticks, [f"{100 - error:g}" for error in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(lines)), [f"{of.method}, {of.way}-way {of.shot}-shot" for of in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)


def draw_curves(lines: Sequence[Line], path: Path) -> bool:
    """Draw how the cells below the article's figure came there, a panel a cell, in all their settings.

    Returns:
        Whether there are any, and so a figure.
    """
    below = list(dict.fromkeys(line.experiment for line in lines if line.is_below))
    cells = [[line for line in lines if line.experiment == name and line.runs] for name in below]
    if not cells:
        return False
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, of_cell in zip(panels, cells, strict=False):
            _draw_curves(axes, of_cell)
        for axes in panels[len(cells) :]:
            axes.set_axis_off()
        figure.savefig(path, dpi=150)
    return True


def _draw_curves(axes: Axes, lines: Sequence[Line]) -> None:
    cell = lines[0]
    assert cell.article is not None
    axes.axhline(cell.article, color=COLOURS[4], linestyle=":")
    for line, colour in zip(lines, cycle(COLOURS), strict=False):
        for number, run in enumerate(line.runs):
            trained = [of["trained_episodes"] for of in run["validations"]]
            accuracies = [100 * of["accuracy"] for of in run["validations"]]
            axes.plot(trained, accuracies, ".-", color=colour, label="" if number else line.budget)
            if trained:
                chosen = trained[accuracies.index(max(accuracies))]
                axes.errorbar(chosen, 100 * run["accuracy"], 100 * run["ci95"], fmt="o", color=colour, capsize=2)
    axes.set(xlabel="training episodes", ylabel="accuracy, %")
    axes.set_title(f"{cell.dataset}: {cell.method}, {cell.way}-way {cell.shot}-shot", fontsize="medium")
    axes.legend(fontsize="small", loc="lower right")


def refresh(page: Path, text: str) -> None:
    """Write ``text`` between the markers of a Markdown file, in place of what stands there.

    Raises:
        FewShotError: there is no such pair of markers.
    """
    before, opening, rest = page.read_text().partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not (opening and closing):
        raise FewShotError(f"{page} has no lines {OPENING} and {CLOSING} for the tables to stand between; add them")
    page.write_text(f"{before}{OPENING}\n{text}{CLOSING}{after}")


def _key(run: Result) -> tuple[Any, ...]:
    return run.get("experiment"), run["dataset"], run["way"], run["shot"]


def _ours(line: Line, machines: Sequence[str]) -> list[str]:
    if not line.runs:
        return [""] * 7
    spread = f" ({min(line.accuracies):.2f} to {max(line.accuracies):.2f})" if len(line.runs) > 1 else ""
    return [
        f"{line.ours:.2f} ± {line.ci95:.2f}",
        f"{len(line.runs)}{spread}",
        f"{line.runs[0]['episodes']:,}",
        line.budget.replace("|", "\\|"),
        f"{line.train_episodes:,}",
        _duration(line.train_seconds),
        str(machines.index(line.machine) + 1) if line.machine else "",
    ]


def _figure(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.1f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _machine(of: Mapping[str, Any]) -> str:
    counts = [f"{of[key]} {key}" for key in ("processes", "threads") if key in of]
    return ", ".join([*(str(of[key]) for key in ("accelerator", "processor") if of.get(key)), *counts])
