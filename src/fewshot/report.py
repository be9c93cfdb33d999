"""Report: published and measured accuracies side by side, as Markdown, CSV and figures."""

import contextlib
import csv
import math
import os
import re
import shlex
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

from fewshot.config import OF_ONE_TASK
from fewshot.errors import FewShotError, reason
from fewshot.files import read_json
from fewshot.models import CARD
from fewshot.results import (
    Result,
    by_settings,
    flat,
    is_evaluation,
    own_validation,
    read_runs,
    run_config,
    seed_of,
    settings,
    split_of,
    training_settings,
)
from fewshot.style import COLOURS, DPI, LINES, MARKERS, STYLE, WIDTH
from fewshot.text import for_csv, for_markdown, for_terminal

OPENING, CLOSING = "<!-- results -->", "<!-- /results -->"
# Overrides that do not affect accuracy or are shown in other columns; all others are listed after the budget.
HARMLESS = re.compile(
    r"[+~]*(experiment(/\w+)?|budget|seed|hardware|resume|trust|pictures|logger|name|(checkpoint|log)_every"
    r"|(run|data|cache)_dir|hydra\..*|dataset|dataset\.source\.split|method|distance|way|shot|test\.episodes)="
)
OF_A_TEST = ("concentration", "mirror")  # overrides of an evaluation that change its accuracy
# Settings shown in other columns.
SHOWN = {
    "way",
    "shot",
    "train.way",
    "train.shot",
    "train.episodes",
    "train.steps",
    "data.split",
    "dataset.source.split",
} | {f"test.{key}" for key in ("way", "shot", "episodes")}
REFERENCES = {"published": "printed", "others": "authors' code, run by others", "article": "article"}
CELL_COLUMNS = ("dataset", "method", "way", "shot", "split")
RESULT_COLUMNS = ("ours", "ci95", "seeds_sd", "lowest", "highest", "seeds", "episodes")
SETUP_COLUMNS = ("trial", "train_way", "train_shot", "chosen_at", "settings", "precision", "encoder_parameters")
RUN_COLUMNS = ("train_episodes", "train_seconds", "machine", "experiment", "command")
SPLIT_MARKERS = {"vinyals": "o", "random": "s", "lake": "^", "ravi": "D"}
# How reference accuracies are drawn: colour, offset within the cell's row, line style in the curves.
REFERENCE_STYLES = {
    "published": (COLOURS[4], -0.24, ":"),
    "others": (COLOURS[3], -0.08, "--"),
    "article": (COLOURS[1], 0.08, "-."),
}


@dataclass(frozen=True)
class Reference:
    """A reference accuracy, measured by others.

    Attributes:
        accuracy: on test classes, in %.
        split: the class split it was measured on.
    """

    accuracy: float
    split: str


@dataclass(frozen=True)
class Line:
    """A line of the report: one cell of the tables in one setting, or runs that belong to no cell.

    Attributes:
        dataset: as a title.
        method: as a title.
        way: classes per test episode.
        shot: support samples per class in a test episode.
        references: known reference accuracies, by the keys of ``REFERENCES``.
        runs: our runs, which differ only in their seed; empty: not run.
        number: position of the line among the cell's lines with runs, from 1.
        total: number of those lines.
        trial: whether an earlier line of the cell has the same split and settings closer to the experiment's.
        differs: settings that differ from that line, unless another column shows them.
        unnamed_split: the split of ``runs`` whose data do not name one.
    """

    dataset: str
    method: str
    way: int
    shot: int
    references: Mapping[str, Reference] = field(default_factory=dict)
    runs: Sequence[Result] = ()
    number: int = 1
    total: int = 1
    trial: bool = False
    differs: Sequence[str] = ()
    unnamed_split: str | None = None

    @property
    def cell(self) -> tuple[str, str, int, int]:
        """Identifies the cell."""
        return self.dataset, self.method, self.way, self.shot

    @property
    def task(self) -> str:
        """Task of the test."""
        return f"{self.way}-way {self.shot}-shot"

    @property
    def split(self) -> str:
        """Class split; empty if there is none, or no runs."""
        return (split_of(self.runs[0]) or self.unnamed_split or "") if self.runs else ""

    @property
    def accuracies(self) -> list[float]:
        """Our accuracy of each seed, in %."""
        return [100 * run["accuracy"] for run in self.runs]

    @property
    def ours(self) -> float | None:
        """Our mean accuracy; None: not run."""
        return mean(self.accuracies) if self.runs else None

    @property
    def ci95(self) -> float:
        """Half the width of the widest 95% interval over test episodes of any seed, in percentage points.

        All seeds are tested on the same episodes, so averaging them does not narrow the interval.
        """
        return max(100 * run["ci95"] for run in self.runs)

    @property
    def seeds_sd(self) -> float | None:
        """Standard deviation over the seeds, in percentage points; None for a single seed."""
        return stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def seeds(self) -> list[int]:
        """Configured seeds of the trainings."""
        return [seed_of(run) for run in self.runs]

    @property
    def episodes(self) -> int:
        """Number of test episodes."""
        return int(self.runs[0]["episodes"])

    @property
    def train(self) -> Mapping[str, Any]:
        """Training settings."""
        run = self.runs[0]
        train = {key: run.get(key) for key in ("way", "shot")} | dict(run_config(run)["train"])
        # Methods that train on classes have batches of images instead of tasks.
        return train if train.get("batch_size") is None else train | {"way": None, "shot": None}

    @property
    def train_seconds(self) -> float:
        """Mean duration of a training."""
        return mean(run["train_seconds"] for run in self.runs)

    @property
    def chosen_at(self) -> str:
        """Task on which the weights were chosen; empty if it is the test's, or if no validation chose them."""
        run = run_config(self.runs[0])
        task = f"{run.get('way')}-way {run.get('shot')}-shot"
        chosen = is_evaluation(self.runs[0]) and run["train"].get("also_on") is None
        return task if chosen and task != self.task else ""

    @property
    def has_curve(self) -> bool:
        """Whether the validations of a run are of what its test measured, unlike those of an evaluation elsewhere."""
        return any(len(run["validations"]) > 1 and own_validation(run) is not None for run in self.runs)

    @property
    def precision(self) -> str:
        """Precision of training and test."""
        return str(settings(self.runs[0]).get("precision", ""))

    @property
    def settings(self) -> str:
        """Budget of the experiment, overrides, and other differences from the cell's first row with the same split."""
        named = [*changes(_described(self.runs)), *self.differs]
        if self.precision not in ("", "32-true") and not any("precision" in setting for setting in named):
            named.append(f"precision={self.precision}")
        return ", ".join(filter(None, [self.runs[0].get("budget"), *named]))

    @property
    def machine(self) -> str:
        """Machines of the runs, each once; empty if no run records one."""
        machines = [run.get("machine") or {} for run in self.runs]
        return "; ".join(dict.fromkeys(_machine(machine) for machine in machines if machine))

    @property
    def command(self) -> str:
        """How to measure the row again, after ``fewshot``: from its weights, if they are kept, or by a training."""
        named = [run["model"] for run in self.runs if run.get("model")]
        if named:
            return f"reproduce {named[0]}"
        experiment = self.runs[0].get("experiment")
        if not experiment:
            return ""
        run = run_config(self.runs[0])
        of_one_task = OF_ONE_TASK.fullmatch(experiment)
        budget = self.runs[0].get("budget")
        overrides = [
            f"experiment={of_one_task[1] if of_one_task else experiment}",
            f"way={run['way']}",
            f"shot={run['shot']}",
        ]
        overrides += ["budget=cpu"] if budget == "cpu" else []
        tested, changed = is_evaluation(self.runs[0]), changes(self.runs[0])
        of_test = [change for change in changed if tested and change.partition("=")[0] in OF_A_TEST]
        overrides += [change for change in changed if change not in of_test]
        overrides += [f"seed={seed}" for seed in self.seeds[:1]]
        training = f"train {' '.join(overrides)}"
        test = ["checkpoint=RUN_DIR", f"way={self.way}", f"shot={self.shot}", *of_test]
        return f"{training}, then evaluate {' '.join(test)}" if tested else training

    def compares(self, key: str) -> bool:
        """Whether our accuracy was measured on the split of a reference, so that the two are comparable."""
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
        runs: directories, or ``results.json`` files.
        tables: cells and their reference accuracies, see ``conf/report.yaml``.
        sources: where the reference accuracies come from, by the keys of ``REFERENCES``.
        out: output directory, created if missing.
        readme: a Markdown file with a pair of markers, between which to write the tables of the cells that ran.

    Returns:
        The files written.

    Raises:
        FewShotError: there are no results, or ``readme`` cannot be read or has no markers; nothing is written.
    """
    page = None if readme is None else Path(readme).expanduser()
    if page is not None:
        _around(page)  # before anything is written
    found = read_runs(runs, known_data=True)
    lines = collect([{**result, **_model_at(path)} for path, result in found.items()], tables)
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in ("report.md", "report.csv", "report.png", "curves.png")]
    written[0].write_text(f"# Results\n\n{markdown(lines, sources)}", encoding="utf-8")
    written[1].write_text(as_csv(lines), encoding="utf-8")
    titles = [table.title for table in tables.values()]
    draw([line for line in lines if line.dataset in titles], written[2])
    draw_curves(lines, written[3])
    if page is not None:
        ran = [line for line in lines if line.runs]
        refresh(page, markdown(ran, sources, os.path.relpath(folder, page.resolve().parent)))
        written.append(page)
    return written


def _model_at(path: Path) -> dict[str, Any]:
    """Return the name and the command of the model next to a ``results.json``, see ``fewshot.models``, if there is one.

    The command takes precedence over the overrides of the run: the defaults of an experiment may have changed since.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        command = shlex.split(read_json(path.with_name(CARD))["command"])
        return {"model": "/".join(path.parts[-4:-1]), "train_overrides": command[2:]}
    return {}


def collect(results: Sequence[Result], tables: Mapping[str, Any]) -> list[Line]:
    """Sort results into the cells of the tables, by their configurations.

    Args:
        results: in any order; those that differ only in their seed share a line.
        tables: see ``conf/report.yaml``.

    Returns:
        At least one line per cell, and one for each additional setting; runs that belong to no cell come last.
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
                    if method.get(key) is not None and method[key].accuracy[position] is not None
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
    for key, other_groups in others.items():
        lines += _lines(Line(*key), other_groups, None)
    return lines


def changes(run: Result) -> list[str]:
    """Return the overrides that make a run differ from its experiment, unless another column shows them."""
    overrides = [str(override) for override in run["overrides"]]
    if "train_overrides" in run:  # an evaluation's own come after them
        overrides = [
            *run["train_overrides"],
            *(override for override in overrides if override.partition("=")[0] in OF_A_TEST),
        ]
    if not run.get("experiment"):  # the encoder is that of the cell, or in the title
        overrides = [override for override in overrides if not override.startswith("encoder=")]
    return [override for override in overrides if not HARMLESS.match(override)]


def markdown(lines: Sequence[Line], sources: Mapping[str, str], folder: str = "") -> str:
    """Format the report's tables, one per data set, with an explanation of the columns.

    Args:
        lines: lines of the report.
        sources: see ``report``.
        folder: directory of the figures, relative to the file that will contain the text.
    """
    machines = list(dict.fromkeys(line.machine for line in lines if line.machine))
    columns = ["method", "task", *REFERENCES.values(), "ours", "spread over seeds", "seeds", "test episodes"]
    columns += ["trained", "settings", "machine", "command"]
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
                task = f"{line.task} ({line.number})" if line.total > 1 else line.task
                cells = [line.method, task, *(_reference(line, key) for key in REFERENCES), *_ours(line, machines)]
                text.append(f"| {' | '.join(map(for_markdown, cells))} |")
        text.append("")
    text += [
        "Accuracy in % on test classes, with the split it was measured on in parentheses: results on different splits "
        "are not comparable. *Ours* uses the weights with the best validation accuracy, or the final ones of a run "
        "that was also trained on the validation classes (`train.also_on=val`): the mean over the seeds ± the "
        "95% interval over the test episodes of one training (the widest, if there are several seeds; all are tested "
        "on the same episodes). *Spread over seeds*: the standard deviation between trainings, with the lowest and "
        "highest accuracy. *Trained*: task and number of the training episodes (for MAML, tasks) and the time of one "
        "training without validation and test; *chosen at*: the weights were chosen on the run's own task and tested "
        "on this one afterwards, and the time is that up to the chosen weights. *Settings*: the budget, `paper` (as "
        "published) or `cpu` (under an hour on two cores), and differences from the experiment or from the first row "
        "of the cell. *Command*: after `fewshot`, what measures the row again: from its weights, without training, "
        "where they are kept (those of one seed).",
        "",
        *(f"*{name.capitalize()}*: {sources[key]}.\n" for key, name in REFERENCES.items()),
        *_verdicts(lines),
        *(f"Machine {number}: {for_markdown(machine)}.\n" for number, machine in enumerate(machines, 1)),
        f"![Accuracy of each cell, published and ours]({Path(folder, 'report.png').as_posix()})",
        "",
        "Training curves: validation accuracy on the task of the test, one curve per seed. The large points show the "
        "test accuracy, with its 95% interval, of the chosen weights, at their training episode. Numbers refer to the "
        "rows of the table; rows *chosen at* a different task, or tested with another setting, have no curve.",
        "",
        f"![Accuracy against training episodes, one panel per cell]({Path(folder, 'curves.png').as_posix()})",
        "",
    ]
    return "\n".join(text)


def as_csv(lines: Sequence[Line]) -> str:
    """Format the report as CSV, with accuracies in % and intervals in percentage points."""
    text = StringIO()
    references = [column for key in REFERENCES for column in (key, f"{key}_split")]
    table = csv.DictWriter(
        text, [*CELL_COLUMNS, *references, *RESULT_COLUMNS, *SETUP_COLUMNS, *RUN_COLUMNS], lineterminator="\n"
    )
    table.writeheader()
    for line in lines:
        row: dict[str, Any] = {key: getattr(line, key) for key in CELL_COLUMNS}
        for key, reference in line.references.items():
            row |= {key: reference.accuracy, f"{key}_split": reference.split}
        if line.runs:
            row |= {key: getattr(line, key) for key in ("ours", "ci95", "seeds_sd", "episodes", "trial", "chosen_at")}
            row |= {"lowest": min(line.accuracies), "highest": max(line.accuracies)}
            row |= {"seeds": " ".join(map(str, line.seeds)), "settings": line.settings, "precision": line.precision}
            row |= {"train_way": line.train["way"], "train_shot": line.train["shot"], "machine": line.machine}
            row |= {key: line.runs[0].get(key) for key in ("encoder_parameters", "experiment")}
            row |= {
                "command": line.command,
                "train_episodes": line.train["episodes"],
                "train_seconds": round(line.train_seconds),
            }
        table.writerow({key: for_csv(value) for key, value in row.items()})
    return text.getvalue()


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the accuracies of each cell in a row: references, and our runs, with hollow markers for trials."""
    shown = [line for line in lines if line.references or line.runs]
    rows = {
        dataset: list(dict.fromkeys(line.cell for line in shown if line.dataset == dataset))
        for dataset in _datasets(shown)
    }
    with mpl.rc_context(STYLE | {"font.size": 9}):
        height = 0.3 * sum(map(len, rows.values())) + 1.0 * len(rows) + 0.9
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        ratios = [len(cells) + 2 for cells in rows.values()]
        panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (dataset, cells) in zip(panels, rows.items(), strict=True):
            _draw_rows(axes, cells, [line for line in shown if line.dataset == dataset])
        splits = {reference.split for line in shown for reference in line.references.values()} | {
            line.split for line in shown if line.runs
        }
        figure.legend(handles=_legend(shown), loc="outside upper center", ncols=3)
        shapes = [
            Line2D([], [], linestyle="", marker=_marker(split), color="#777777", label=f"{_name(split)} split")
            for split in sorted(splits)
        ]
        _without_math(figure.legend(handles=shapes, loc="outside lower center", ncols=4))
        figure.savefig(path, dpi=DPI)


def draw_curves(lines: Sequence[Line], path: Path) -> None:
    """Draw the training curves: one panel per cell with a curve, for all its settings."""
    cells = list(dict.fromkeys(line.cell for line in lines if line.has_curve))
    if not cells:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, 1))
            figure.text(0.5, 0.5, "no training curves: the runs have no validations", ha="center", va="center")
            figure.savefig(path, dpi=DPI)
        return
    ran = [line for line in lines if line.runs and line.cell in cells]
    columns = min(3, len(cells))
    entries = [
        line.total + len(line.references) for cell in cells for line in ran if line.cell == cell and line.number == 1
    ]
    rows = [max(entries[first : first + columns]) for first in range(0, len(cells), columns)]
    heights = [2.5 + 0.15 * math.ceil(row / 2) for row in rows]  # legends have two columns
    with mpl.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(WIDTH / 3 * columns, sum(heights)), layout="constrained")
        panels = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).flat)
        for axes, cell in zip(panels, cells, strict=False):
            _draw_curves(axes, [line for line in ran if line.cell == cell])
        for axes in panels[len(cells) :]:
            axes.remove()
        figure.savefig(path, dpi=DPI)


def refresh(page: Path, text: str) -> None:
    """Replace the text between the markers of a Markdown file.

    Raises:
        FewShotError: it cannot be read, or the markers are missing.
    """
    before, after = _around(page)
    page.write_text(f"{before}{OPENING}\n{text}{CLOSING}{after}", encoding="utf-8")


def _around(page: Path) -> tuple[str, str]:
    """Return what is before and after the markers of a Markdown file."""
    try:
        before, opening, rest = page.read_text(encoding="utf-8").partition(OPENING)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise FewShotError(f"readme={page} cannot be read: {why}; name a Markdown file") from error
    _, closing, after = rest.partition(CLOSING)
    if not (opening and closing):
        raise FewShotError(f"{page} has no lines {OPENING} and {CLOSING} to write the tables between; add them")
    return before, after


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
    """Make the lines of a cell, sorted so that the settings closest to the experiment's come first."""

    def distance(group: list[Result]) -> tuple[bool, int, bool]:
        run = _described(group)
        return bool(run_config(run)["train"].get("also_on")), len(changes(run)), is_evaluation(run)

    ordered = sorted(groups, key=distance)
    lines: list[Line] = []
    for number, group in enumerate(ordered, 1):
        name = unnamed["name"] if unnamed is not None and group[0]["data"]["classes"] == unnamed["classes"] else None
        line = replace(cell, runs=group, number=number, total=len(ordered), unnamed_split=name)
        first = next((other for other in lines if other.split == line.split), None)
        differs = [] if first is None else _differences(_described(group), _described(first.runs))
        lines.append(replace(line, trial=first is not None, differs=differs))
    return lines


def _described(runs: Sequence[Result]) -> Result:
    """Return the run whose overrides stand for all: one with a card, which has those from today's defaults."""
    return next((run for run in runs if run.get("model")), runs[0])


def _differences(run: Result, first: Result) -> list[str]:
    """Return the settings in which a run differs from ``first``, unless an override or another column shows them."""
    own, other = settings(run), settings(first)
    named = {change.lstrip("+~").partition("=")[0] for change in changes(run)}
    named |= {f"test.{key}" for key in OF_A_TEST if key in named}
    if "train_overrides" in run and "train_overrides" in first:  # both say how they differ from the experiment
        named |= {*training_settings(run), *training_settings(first)}
    if "hardware.precision" in named:
        named.add("precision")
    joined = own.get("train.also_on") != other.get("train.also_on")  # explains the numbers of classes and images
    differences, configured = [], dict(flat(run_config(run)))
    for key in {**own, **other}:
        if own.get(key) == other.get(key) or key in SHOWN or key in named or (joined and key.startswith("data.")):
            continue
        value = own.get(key, False if configured.get(key) is False else "unset")
        if isinstance(value, bool):
            value = str(value).lower()
        differences.append(f"{key}={value[:8] if 'sha256' in key and isinstance(value, str) else value}")
    return differences


def _verdicts(lines: Sequence[Line]) -> list[str]:
    """List which cells reach the reference accuracies measured on the same split."""
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
            sides = (("at or above, within the interval", reached), ("below", below))
            verdict = ". ".join(f"{side.capitalize()}: {'; '.join(cells)}" for side, cells in sides if cells)
            text.append(f"Compared with *{name}*, on the same split, first rows only. {verdict}.\n")
    return text


def _reference(line: Line, key: str) -> str:
    reference = line.references.get(key)
    return "" if reference is None else f"{reference.accuracy:.1f} ({reference.split})"


def _ours(line: Line, machines: Sequence[str]) -> list[str]:
    if not line.runs:
        return [""] * 8
    spread = ""
    if line.seeds_sd is not None:
        spread = f"{line.seeds_sd:.2f} ({min(line.accuracies):.2f} to {max(line.accuracies):.2f})"
    images, episodes = line.train.get("batch_size"), f"{line.train['episodes']:,}"
    trained = (
        [f"{line.train['way']}-way {line.train['shot']}-shot", f"{episodes} episodes"]
        if images is None
        else [f"{episodes} batches of {images} images"]
    )
    trained += ["training and validation classes"] if line.train.get("also_on") else []
    trained += [f"chosen at {line.chosen_at}"] if line.chosen_at else []
    return [
        f"{line.ours:.2f} ± {line.ci95:.2f}" + (f" ({line.split})" if line.split else ""),
        spread,
        ", ".join(map(str, line.seeds)),
        f"{line.episodes:,}",
        ", ".join([*trained, _duration(line.train_seconds)]),
        line.settings,
        str(machines.index(line.machine) + 1) if line.machine else "",
        line.command,
    ]


def _datasets(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.dataset for line in lines))


def _legend(lines: Sequence[Line]) -> list[Line2D]:
    """Make the legend entries of the sources, by colour."""
    plain: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6}
    handles = [
        Line2D([], [], color=colour, fillstyle="none", label=REFERENCES[key], **plain)
        for key, (colour, *_) in REFERENCE_STYLES.items()
        if any(key in line.references for line in lines)
    ]
    if any(line.runs for line in lines):
        handles.append(Line2D([], [], color=COLOURS[0], label="ours, with the 95% interval", **plain))
    if any(line.trial for line in lines):
        trial = plain | {"markersize": 4, "markerfacecolor": "white"}
        handles.append(Line2D([], [], color=COLOURS[0], label="ours, with different settings", **trial))
    return handles


def _marker(split: str) -> str:
    return SPLIT_MARKERS.get(split, "P")


def _draw_rows(axes: Axes, cells: Sequence[tuple[str, str, int, int]], lines: Sequence[Line]) -> None:
    """Draw one row per cell, from top to bottom: references, ours, trials."""
    for line in lines:
        row = cells.index(line.cell)
        if line.number == 1:
            for key, reference in line.references.items():
                colour, shift, _ = REFERENCE_STYLES[key]
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
        xlabel="test accuracy, % (log scale of the error)",
    )
    axes.set_title(_short(lines[0].dataset, 50, 1)[0], parse_math=False)
    axes.invert_xaxis()
    most, least = axes.get_xlim()
    ticks: list[float] = []
    for error in (90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        # Keep ticks at least a label's width apart.
        apart = math.log(most / least) * 0.07
        if least < error < most and (not ticks or math.log(ticks[-1] / error) > apart):
            ticks.append(error)
    axes.set_xticks(ticks, [f"{100 - error:g}" for error in ticks])
    axes.minorticks_off()
    labels = [f"{_short(method, 44, 1)[0]}, {way}-way {shot}-shot" for _, method, way, shot in cells]
    axes.set_yticks(range(len(cells)), labels, parse_math=False)
    axes.set_ylim(len(cells) - 0.4, -0.6)


def _error(percent: float) -> float:
    return max(100 - percent, 0.01)  # zero has no place on a log axis


def _draw_curves(axes: Axes, lines: Sequence[Line]) -> None:
    cell = lines[0]
    for key, reference in cell.references.items():
        colour, _, style = REFERENCE_STYLES[key]
        name = "others" if key == "others" else REFERENCES[key]
        axes.axhline(
            reference.accuracy, color=colour, linestyle=style, linewidth=1, label=f"{name}, {_name(reference.split)}"
        )
    for position, line in enumerate(lines):
        # The numbers of colours and line styles have no common factor, so every combination is used.
        colour, style = COLOURS[position % len(COLOURS)], LINES[position % len(LINES)]
        marker = MARKERS[position % len(MARKERS)]
        number = f" ({line.number})" if line.total > 1 else ""  # as in the table
        label = f"ours{number}, {_name(line.split)}"
        for run in line.runs:
            trained = [point["trained_episodes"] for point in run["validations"]]
            accuracies = [100 * point["accuracy"] for point in run["validations"]]
            chosen = trained[accuracies.index(max(accuracies))] if trained else line.train["episodes"]
            if line.has_curve:
                axes.plot(trained, accuracies, style, color=colour, linewidth=1.2)
            axes.errorbar(chosen, 100 * run["accuracy"], 100 * run["ci95"], fmt=marker, color=colour, capsize=2)
        axes.plot([], [], style, marker=marker, color=colour, label=label)
    axes.set(xlabel="training episodes", ylabel="accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    title = [*_short(cell.method, 36, 2), *_short(f"{cell.dataset}, {cell.task}", 36, 2)]
    axes.set_title("\n".join(title), fontsize="medium", parse_math=False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -32 / 72, figure.dpi_scale_trans)  # below the axis and its label
    anchor: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, 0), "bbox_transform": below}
    _without_math(axes.legend(fontsize="small", ncols=2, frameon=False, **anchor))


def _name(split: str) -> str:
    return _short(split, 16, 1)[0] if split else "unnamed"


def _without_math(legend: Legend) -> None:
    """Disable math text: a name may contain a dollar sign."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(text: str, width: int, lines: int) -> list[str]:
    """Wrap a string into at most ``lines`` lines; unprintable characters are escaped."""
    parts = wrap(for_terminal(text), width) or [""]
    return parts if len(parts) <= lines else [*parts[: lines - 1], f"{parts[lines - 1][: width - 1]}…"]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _machine(machine: Mapping[str, Any]) -> str:
    words = (("processes", "process"), ("threads", "thread"))
    counts = [f"{machine[key]} {one if machine[key] == 1 else key}" for key, one in words if key in machine]
    return ", ".join([*(str(machine[key]) for key in ("accelerator", "processor") if machine.get(key)), *counts])
