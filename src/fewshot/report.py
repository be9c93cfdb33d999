"""The report: printed accuracies, those of others and ours side by side, as Markdown, as CSV and as figures."""

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from textwrap import wrap
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from fewshot.errors import FewShotError
from fewshot.results import Result, by_settings, is_evaluation, read_results, run_config, seed_of, settings, split_of
from fewshot.style import COLOURS, LINES, MARKERS, STYLE
from fewshot.text import for_csv, for_markdown

OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"
# Overrides that change no accuracy, or that another column of the table shows; the others stand beside the budget.
HARMLESS = re.compile(
    r"[+~]*(experiment(/\w+)?|budget|seed|hardware|resume|trust|pictures|logger|(checkpoint|log)_every"
    r"|(run|data|cache)_dir|hydra\..*|dataset|dataset\.source\.split|method|distance|encoder|way|shot|test\.episodes)="
)
# Settings that other columns show.
SHOWN = {"way", "shot", "train.way", "train.shot", "train.episodes", "data.split", "dataset.source.split"} | {
    f"test.{key}" for key in ("way", "shot", "episodes")
}
REFERENCES = {"published": "printed", "others": "authors' code, others' hands", "article": "article"}
KNOWN = ("dataset", "method", "way", "shot", "split")
OURS = ("ours", "ci95", "seeds_sd", "lowest", "highest", "seeds", "episodes")
HOW = ("trial", "train_way", "train_shot", "chosen_at", "settings", "precision", "encoder_parameters")
REST = ("train_episodes", "train_seconds", "machine", "experiment")
SPLIT_MARKERS = {"vinyals": "o", "random": "s", "lake": "^", "ravi": "D"}
# How the accuracies of others are drawn: colour, place in the row of a cell, line among curves.
WHO = {"published": (COLOURS[4], -0.24, ":"), "others": (COLOURS[3], -0.08, "--"), "article": (COLOURS[1], 0.08, "-.")}
WIDTH, DPI = 9, 110  # of a figure, inches and pixels an inch: about as wide as a page shows it


@dataclass(frozen=True)
class Reference:
    """An accuracy of someone else.

    Attributes:
        accuracy: on test classes, in %.
        split: the rule that split the classes it was measured on.
    """

    accuracy: float
    split: str


@dataclass(frozen=True)
class Line:
    """A line of the report: what is known of one cell of the tables, or of runs that belong to none.

    Attributes:
        dataset: as a title.
        method: as a title.
        way: classes in an episode of the test.
        shot: support samples a class in an episode of the test.
        references: accuracies of others by the keys of ``REFERENCES``, those that are known.
        runs: ours, one a seed, which differ in nothing else; none: not run.
        number: of the line among those of the cell that ran, from 1.
        of: how many those are.
        trial: whether an earlier line of the cell has the same split, with settings nearer to the experiment's.
        differs: what the settings differ in from that line, as far as no other column shows it.
        unnamed_split: the split of ``runs`` whose data name none.
    """

    dataset: str
    method: str
    way: int
    shot: int
    references: Mapping[str, Reference] = field(default_factory=dict)
    runs: Sequence[Result] = ()
    number: int = 1
    of: int = 1
    trial: bool = False
    differs: Sequence[str] = ()
    unnamed_split: str | None = None

    @property
    def cell(self) -> tuple[str, str, int, int]:
        """What the lines of one cell share."""
        return self.dataset, self.method, self.way, self.shot

    @property
    def task(self) -> str:
        """Of the test."""
        return f"{self.way}-way {self.shot}-shot"

    @property
    def split(self) -> str:
        """The rule that split the classes; empty where there is none, or nothing ran."""
        return (split_of(self.runs[0]) or self.unnamed_split or "") if self.runs else ""

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
        """Half the width of the widest 95% interval of a seed over its test episodes, in percentage points.

        The seeds are tested on the same episodes, so the interval of their mean is not narrower by their number.
        """
        return max(100 * run["ci95"] for run in self.runs)

    @property
    def seeds_sd(self) -> float | None:
        """The standard deviation over the seeds, in percentage points; None where there is one."""
        return stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def seeds(self) -> list[int]:
        """Of the trainings, as configured."""
        return [seed_of(run) for run in self.runs]

    @property
    def episodes(self) -> int:
        """Of the test."""
        return int(self.runs[0]["episodes"])

    @property
    def train(self) -> Mapping[str, Any]:
        """The settings of the training."""
        run = self.runs[0]
        train = {key: run.get(key) for key in ("way", "shot")} | dict(run_config(run)["train"])
        # A method that trains on classes has batches of images in place of tasks.
        return train if train.get("batch_size") is None else train | {"way": None, "shot": None}

    @property
    def train_seconds(self) -> float:
        """Of one training, the mean."""
        return mean(run["train_seconds"] for run in self.runs)

    @property
    def chosen_at(self) -> str:
        """The task on which the weights were chosen, where it is not that of the test."""
        run = run_config(self.runs[0])
        task = f"{run.get('way')}-way {run.get('shot')}-shot"
        return task if is_evaluation(self.runs[0]) and task != self.task else ""

    @property
    def precision(self) -> str:
        """Of the training and the test."""
        return str(settings(self.runs[0]).get("precision", ""))

    @property
    def settings(self) -> str:
        """The budget of the experiment, the overrides, and what else differs from the line above."""
        named = [*changes(self.runs[0]), *self.differs]
        if self.precision not in ("", "32-true") and not any("precision" in setting for setting in named):
            named.append(f"precision={self.precision}")
        return ", ".join(filter(None, [self.runs[0].get("budget"), *named]))

    @property
    def machine(self) -> str:
        """What the runs were made on, each machine once; empty where no run tells."""
        machines = [run.get("machine") or {} for run in self.runs]
        return "; ".join(dict.fromkeys(_machine(machine) for machine in machines if machine))

    def compares(self, key: str) -> bool:
        """Whether ours was measured on the split of a reference, so that one can be above or below the other."""
        return bool(self.runs) and key in self.references and self.references[key].split == self.split


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
        sources: where that stands, by the keys of ``REFERENCES``.
        out: a folder, made if need be.
        readme: a Markdown file with a pair of markers, between which the tables of the cells that ran are written.

    Returns:
        The files written.

    Raises:
        FewShotError: there are no results, or no markers in ``readme``.
    """
    lines = collect(read_results(runs, known_data=True), tables)
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in ("report.md", "report.csv", "report.png", "curves.png")]
    written[0].write_text(f"# Results\n\n{markdown(lines, sources)}", encoding="utf-8")
    written[1].write_text(as_csv(lines), encoding="utf-8")
    titles = [table.title for table in tables.values()]
    draw([line for line in lines if line.dataset in titles], written[2])
    draw_curves(lines, written[3])
    if readme is not None:
        page = Path(readme).expanduser()
        ran = [line for line in lines if line.runs]
        refresh(page, markdown(ran, sources, os.path.relpath(folder, page.resolve().parent)))
        written.append(page)
    return written


def collect(results: Sequence[Result], tables: Mapping[str, Any]) -> list[Line]:
    """Sort results into the cells of the tables, by what their configuration says.

    Args:
        results: in any order; those that differ by their seed only share a line.
        tables: see ``conf/report.yaml``.

    Returns:
        For every cell at least one line, and one for each other setting; the last lines are of no cell.
    """
    groups = by_settings(results)
    lines: list[Line] = []
    for dataset, table in tables.items():
        for method in table.methods.values():
            match = {"choices.dataset": dataset, **method.match}
            for position, task in enumerate(table.cells):
                way, shot = map(int, re.findall(r"\d+", task))
                references = {
                    key: Reference(method[key].accuracy[position], method[key].split)
                    for key in REFERENCES
                    if method.get(key) is not None
                }
                cell = Line(table.title, method.title, way, shot, references)
                inside = [
                    group
                    for group in groups
                    if (group[0]["way"], group[0]["shot"]) == (way, shot) and _matches(group[0], match)
                ]
                lines += _lines(cell, inside, table.get("unnamed_split")) or [cell]
                groups = [group for group in groups if group not in inside]
    others: dict[tuple[str, str, int, int], list[list[Result]]] = {}
    for group in groups:
        run = group[0]
        names = [str(run[key]) for key in ("method", "distance", "encoder") if run.get(key)]
        key = (f"Other runs on {run['dataset']}", " ".join(names), run["way"], run["shot"])
        others.setdefault(key, []).append(group)
    for key, of_key in others.items():
        lines += _lines(Line(*key), of_key, None)
    return lines


def changes(run: Result) -> list[str]:
    """The overrides that make a run another one than its experiment, as far as no other column shows them."""
    return [override for override in map(str, run["overrides"]) if not HARMLESS.match(override)]


def markdown(lines: Sequence[Line], sources: Mapping[str, str], folder: str = "") -> str:
    """The report's tables, one a data set, and what their columns mean.

    Args:
        lines: of the report.
        sources: see ``report``.
        folder: that of the figures, as a link from where the text is to stand.
    """
    machines = list(dict.fromkeys(line.machine for line in lines if line.machine))
    columns = ["method", "task", *REFERENCES.values(), "ours", "spread over seeds", "seeds", "test episodes"]
    columns += ["trained", "settings", "machine"]
    text = []
    for dataset in dict.fromkeys(line.dataset for line in lines):
        text += [
            f"**{for_markdown(dataset)}**",
            "",
            f"| {' | '.join(columns)} |",
            f"| {' | '.join(['---'] * len(columns))} |",
        ]
        for line in lines:
            if line.dataset == dataset:
                task = f"{line.task} ({line.number})" if line.of > 1 else line.task
                cells = [line.method, task, *(_reference(line, key) for key in REFERENCES), *_ours(line, machines)]
                text.append(f"| {' | '.join(map(for_markdown, cells))} |")
        text.append("")
    text += [
        "Accuracy in % on test classes, and in parentheses the split it was measured on: figures on different splits "
        "do not compare. *Ours* comes from the weights that were best on validation classes: the mean over the seeds, "
        "± the 95% interval over the test episodes of one training, the widest of them where there are several seeds "
        "(all are tested on the same episodes). *Spread over seeds*: the standard deviation between trainings, with "
        "the lowest and the highest. *Trained*: the task and number of training episodes (for MAML, tasks) and the "
        "time of one training, validation and test left out; *chosen at*: the run's own task was another one, and its "
        "best weights were tested on this one afterwards. *Settings*: the budget, `paper`, as published, or `cpu`, "
        "what two cores do in under an hour, and what differs from the experiment or from the first line of the cell.",
        "",
        *(f"*{name.capitalize()}*: {sources[key]}.\n" for key, name in REFERENCES.items()),
        *_verdicts(lines),
        *(f"Machine {number}: {for_markdown(machine)}.\n" for number, machine in enumerate(machines, 1)),
        f"![Accuracy of each cell, of others and ours]({Path(folder, 'report.png').as_posix()})",
        "",
        "How the trainings went: validation accuracy on the task of the test, every seed a curve; the large points are "
        "the test, with its 95% interval, of the weights chosen, at their training episode. Numbers are those of the "
        "lines in the table; lines *chosen at* another task have no curve on this one.",
        "",
        f"![Accuracy against training episodes, a panel a cell]({Path(folder, 'curves.png').as_posix()})",
        "",
    ]
    return "\n".join(text)


def as_csv(lines: Sequence[Line]) -> str:
    """The report as comma-separated values; accuracies in %, their intervals in percentage points."""
    text = StringIO()
    references = [column for key in REFERENCES for column in (key, f"{key}_split")]
    table = csv.DictWriter(text, [*KNOWN, *references, *OURS, *HOW, *REST], lineterminator="\n")
    table.writeheader()
    for line in lines:
        row: dict[str, Any] = {key: getattr(line, key) for key in KNOWN}
        for key, reference in line.references.items():
            row |= {key: reference.accuracy, f"{key}_split": reference.split}
        if line.runs:
            row |= {key: getattr(line, key) for key in ("ours", "ci95", "seeds_sd", "episodes", "trial", "chosen_at")}
            row |= {"lowest": min(line.accuracies), "highest": max(line.accuracies)}
            row |= {"seeds": " ".join(map(str, line.seeds)), "settings": line.settings, "precision": line.precision}
            row |= {"train_way": line.train["way"], "train_shot": line.train["shot"], "machine": line.machine}
            row |= {key: line.runs[0].get(key) for key in ("encoder_parameters", "experiment")}
            row |= {"train_episodes": line.train["episodes"], "train_seconds": round(line.train_seconds)}
        table.writerow({key: for_csv(value) for key, value in row.items()})
    return text.getvalue()


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the accuracies of each cell in a row: of others, and ours where we ran, trials hollow."""
    shown = [line for line in lines if line.references or line.runs]
    rows = {
        dataset: list(dict.fromkeys(of.cell for of in shown if of.dataset == dataset)) for dataset in _datasets(shown)
    }
    with mpl.rc_context(STYLE | {"font.size": 9}):
        height = 0.3 * sum(map(len, rows.values())) + 1.0 * len(rows) + 0.9
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        ratios = [len(cells) + 2 for cells in rows.values()]
        panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (dataset, cells) in zip(panels, rows.items(), strict=True):
            _draw_rows(axes, cells, [line for line in shown if line.dataset == dataset])
        splits = {of.split for line in shown for of in line.references.values()} | {
            line.split for line in shown if line.runs
        }
        figure.legend(handles=_who(shown), loc="outside upper center", ncols=3)
        shapes = [
            Line2D([], [], linestyle="", marker=_marker(split), color="#777777", label=f"{_name(split)} split")
            for split in sorted(splits)
        ]
        _as_they_are(figure.legend(handles=shapes, loc="outside lower center", ncols=4))
        figure.savefig(path, dpi=DPI)


def draw_curves(lines: Sequence[Line], path: Path) -> None:
    """Draw how the trainings went, a panel a cell that ran, in all its settings."""
    ran = [line for line in lines if line.runs]
    cells = list(dict.fromkeys(line.cell for line in ran))
    columns = min(3, len(cells))
    entries = [
        line.of + len(line.references) for cell in cells for line in ran if line.cell == cell and line.number == 1
    ]
    rows = [max(entries[first : first + columns]) for first in range(0, len(cells), columns)]
    heights = [2.5 + 0.15 * math.ceil(of_row / 2) for of_row in rows]  # a legend has two columns
    with mpl.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(WIDTH / 3 * columns, sum(heights)), layout="constrained")
        panels = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).flat)
        for axes, cell in zip(panels, cells, strict=False):
            _draw_curves(axes, [line for line in ran if line.cell == cell])
        for axes in panels[len(cells) :]:
            axes.remove()
        figure.savefig(path, dpi=DPI)


def refresh(page: Path, text: str) -> None:
    """Write ``text`` between the markers of a Markdown file, in place of what stands there.

    Raises:
        FewShotError: there is no such pair of markers.
    """
    before, opening, rest = page.read_text(encoding="utf-8").partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not (opening and closing):
        raise FewShotError(f"{page} has no lines {OPENING} and {CLOSING} for the tables to stand between; add them")
    page.write_text(f"{before}{OPENING}\n{text}{CLOSING}{after}", encoding="utf-8")


def _matches(result: Result, match: Mapping[str, Any]) -> bool:
    config = run_config(result)
    for key, value in match.items():
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node != value:
            return False
    return True


def _lines(cell: Line, groups: Sequence[list[Result]], unnamed: Mapping[str, Any] | None) -> list[Line]:
    """The lines of a cell: of each split first the one whose settings are nearest to the experiment's."""
    ordered = sorted(groups, key=lambda group: (len(changes(group[0])), is_evaluation(group[0])))
    lines: list[Line] = []
    for number, group in enumerate(ordered, 1):
        name = unnamed["name"] if unnamed is not None and group[0]["data"]["classes"] == unnamed["classes"] else None
        line = replace(cell, runs=group, number=number, of=len(ordered), unnamed_split=name)
        first = next((other for other in lines if other.split == line.split), None)
        differs = [] if first is None else _differences(group[0], first.runs[0])
        lines.append(replace(line, trial=first is not None, differs=differs))
    return lines


def _differences(run: Result, first: Result) -> list[str]:
    """The settings in which a run differs from another, unless an override or another column shows them."""
    own, other = settings(run), settings(first)
    named = {change.lstrip("+~").partition("=")[0] for change in changes(run)}
    differences = []
    for key in {**own, **other}:
        if own.get(key) == other.get(key) or key in SHOWN or key in named:
            continue
        value = own.get(key, "unset")
        differences.append(f"{key}={value[:8] if 'sha256' in key and isinstance(value, str) else value}")
    return differences


def _verdicts(lines: Sequence[Line]) -> list[str]:
    """Which cells reach the figures of others that were measured on the same split."""
    text = []
    for key, name in REFERENCES.items():
        compared = [line for line in lines if not line.trial and line.compares(key)]
        reached: list[str] = []
        below: list[str] = []
        for line in compared:
            assert line.ours is not None
            side = reached if line.ours + line.ci95 >= line.references[key].accuracy else below
            side.append(for_markdown(f"{line.method}, {line.task} on {line.dataset}"))
        if compared:
            sides = (("at or above it, within the interval", reached), ("below it", below))
            verdict = ". ".join(f"{side.capitalize()}: {'; '.join(cells)}" for side, cells in sides if cells)
            text.append(f"Beside *{name}*, where both were measured on the same split, first lines only. {verdict}.\n")
    return text


def _reference(line: Line, key: str) -> str:
    reference = line.references.get(key)
    return "" if reference is None else f"{reference.accuracy:.1f} ({reference.split})"


def _ours(line: Line, machines: Sequence[str]) -> list[str]:
    if not line.runs:
        return [""] * 7
    spread = ""
    if line.seeds_sd is not None:
        spread = f"{line.seeds_sd:.2f} ({min(line.accuracies):.2f} to {max(line.accuracies):.2f})"
    images, episodes = line.train.get("batch_size"), f"{line.train['episodes']:,}"
    trained = (
        [f"{line.train['way']}-way {line.train['shot']}-shot", f"{episodes} episodes"]
        if images is None
        else [f"{episodes} batches of {images} images"]
    )
    trained += [f"chosen at {line.chosen_at}"] if line.chosen_at else []
    return [
        f"{line.ours:.2f} ± {line.ci95:.2f}" + (f" ({line.split})" if line.split else ""),
        spread,
        ", ".join(map(str, line.seeds)),
        f"{line.episodes:,}",
        ", ".join([*trained, _duration(line.train_seconds)]),
        line.settings,
        str(machines.index(line.machine) + 1) if line.machine else "",
    ]


def _datasets(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.dataset for line in lines))


def _who(lines: Sequence[Line]) -> list[Line2D]:
    """The entries of the legend that say whose a figure is, colour by colour."""
    plain: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6}
    handles = [
        Line2D([], [], color=colour, fillstyle="none", label=REFERENCES[key], **plain)
        for key, (colour, *_) in WHO.items()
        if any(key in line.references for line in lines)
    ]
    if any(line.runs for line in lines):
        handles.append(Line2D([], [], color=COLOURS[0], label="ours, with the 95% interval", **plain))
    if any(line.trial for line in lines):
        trial = plain | {"markersize": 4, "markerfacecolor": "white"}
        handles.append(Line2D([], [], color=COLOURS[0], label="ours, with other settings", **trial))
    return handles


def _marker(split: str) -> str:
    return SPLIT_MARKERS.get(split, "P")


def _draw_rows(axes: Axes, cells: Sequence[tuple[str, str, int, int]], lines: Sequence[Line]) -> None:
    """A row a cell: above each other in it the figures of others, then ours, trials below."""
    for line in lines:
        row = cells.index(line.cell)
        if line.number == 1:
            for key, reference in line.references.items():
                colour, shift, _ = WHO[key]
                axes.plot(
                    _error(reference.accuracy), row + shift, _marker(reference.split), color=colour, fillstyle="none"
                )
        if line.ours is not None:
            axes.errorbar(
                _error(line.ours),
                row + (0.38 if line.trial else 0.24),
                xerr=[[min(line.ci95, 0.99 * _error(line.ours))], [line.ci95]],
                fmt=_marker(line.split),
                color=COLOURS[0],
                markerfacecolor="white" if line.trial else COLOURS[0],
                markersize=4 if line.trial else 6,
                elinewidth=0.8 if line.trial else 1.5,
                capsize=2,
                zorder=2 if line.trial else 3,
            )
    axes.set(
        xscale="log",
        xlabel="test accuracy, % (the scale is that of the error)",
    )
    axes.set_title(_short(lines[0].dataset, 50, 1)[0], parse_math=False)
    axes.invert_xaxis()
    most, least = axes.get_xlim()
    ticks: list[float] = []
    for error in (90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        # No nearer to the one before than a label is wide.
        apart = math.log(most / least) * 0.07
        if least < error < most and (not ticks or math.log(ticks[-1] / error) > apart):
            ticks.append(error)
    axes.set_xticks(ticks, [f"{100 - error:g}" for error in ticks])
    axes.minorticks_off()
    labels = [f"{_short(method, 44, 1)[0]}, {way}-way {shot}-shot" for _, method, way, shot in cells]
    axes.set_yticks(range(len(cells)), labels, parse_math=False)
    axes.set_ylim(len(cells) - 0.4, -0.6)


def _error(percent: float) -> float:
    return max(100 - percent, 0.01)  # no error at all has no place on the axis


def _draw_curves(axes: Axes, lines: Sequence[Line]) -> None:
    cell = lines[0]
    for key, reference in cell.references.items():
        colour, _, style = WHO[key]
        name = "others" if key == "others" else REFERENCES[key]
        axes.axhline(
            reference.accuracy, color=colour, linestyle=style, linewidth=1, label=f"{name}, {_name(reference.split)}"
        )
    for position, line in enumerate(lines):
        # As many styles as there are pairs of the two, whose numbers have no common factor.
        colour, style = COLOURS[position % len(COLOURS)], LINES[position % len(LINES)]
        marker = MARKERS[position % len(MARKERS)]
        label = f"{line.number}, {_name(line.split)}" if line.split else str(line.number)
        for run in line.runs:
            trained = [point["trained_episodes"] for point in run["validations"]]
            accuracies = [100 * point["accuracy"] for point in run["validations"]]
            chosen = trained[accuracies.index(max(accuracies))] if trained else line.train["episodes"]
            if not line.chosen_at:
                axes.plot(trained, accuracies, style, color=colour, linewidth=1.2)
            axes.errorbar(chosen, 100 * run["accuracy"], 100 * run["ci95"], fmt=marker, color=colour, capsize=2)
        axes.plot([], [], style, marker=marker, color=colour, label=label)
    axes.set(xlabel="training episodes", ylabel="accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    title = [*_short(cell.method, 40, 2), *_short(f"{cell.dataset}, {cell.task}", 40, 2)]
    axes.set_title("\n".join(title), fontsize="medium", parse_math=False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -32 / 72, figure.dpi_scale_trans)  # the axis and its label
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, 0), "bbox_transform": below}
    _as_they_are(axes.legend(fontsize="small", ncols=2, frameon=False, **place))


def _name(split: str) -> str:
    return _short(split, 16, 1)[0] if split else "unnamed"


def _as_they_are(legend: Legend) -> None:
    """No formulas: a name may hold a dollar sign."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(text: str, width: int, lines: int) -> list[str]:
    """A text in at most so many lines."""
    parts = wrap(text, width)
    return parts if len(parts) <= lines else [*parts[: lines - 1], f"{parts[lines - 1][: width - 1]}…"]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _machine(machine: Mapping[str, Any]) -> str:
    counts = [f"{machine[key]} {key}" for key in ("processes", "threads") if key in machine]
    return ", ".join([*(str(machine[key]) for key in ("accelerator", "processor") if machine.get(key)), *counts])
