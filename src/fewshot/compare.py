"""Compare any runs, evaluations and sweeps: tables and figures, as a page to open and as Markdown to paste."""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from fewshot.errors import FewShotError
from fewshot.metrics import Estimate, paired_difference
from fewshot.results import (
    EPISODES,
    Result,
    is_evaluation,
    own_validation,
    read_episodes,
    read_runs,
    seed_of,
    split_of,
)
from fewshot.style import COLOURS, DPI, STYLE, WIDTH, fit_rows
from fewshot.sweeps import differing
from fewshot.text import cut, for_figure, for_html, for_markdown, make_table, say

NAMED = ("method", "distance", "encoder", "seed")  # settings with a column
# Overrides that another column or the task shows, or that do not affect accuracy.
HIDDEN = {
    *(*NAMED, "dataset", "way", "shot", "test.episodes", "concentration", "hydra.run.dir", "run_dir", "logger"),
    "pictures",
}
EXPLANATION = (
    "Accuracy in % on test classes with its 95% interval over the episodes. Kind: a transductive method uses all "
    "queries of an episode together, and may assume balanced ones, as many of every class; an inductive one answers "
    "each query by itself. Difference: accuracy minus that of the reference, in percentage points, episode by episode "
    "on the same episodes, with its 95% interval. Time: of the training, without validation and test. Milliseconds per "
    "episode: of the method in a test, without the time to draw the episodes, and of methods that compare embeddings "
    "without the time to embed the images, which are embedded once before the first episode; MAML's has that of its "
    "network. On a CPU, it is the processor time of all threads. Parameters: of the encoder."
)
SHORT = ("run", "kind", "accuracy", "difference", "time", "ms/episode")  # columns in the terminal
KINDS = ("inductive", "transductive", "transductive, assumes balance")
MANY = "osD^vPX<>*hpd8H"  # markers, one for each method
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Comparison of runs</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222; }}
img {{ max-width: 100%; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.3em 0.6em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>Comparison of runs</h1>
{tables}
<p>{explanation}</p>
{notes}
{figures}
</body>
</html>
"""


@dataclass(frozen=True)
class Run:
    """A run to compare.

    Attributes:
        number: its position in the table, from 1.
        folder: its directory, relative to the one that all have in common.
        result: its results.
        correct: its number of correct predictions in each test episode; None if it is unknown.
        name: its method, and what else differs between the runs of the task.
        line: like ``name``, but across all tasks, so that a method has one label.
        settings: its overrides that differ between the runs of the task, unless a column shows them.
    """

    number: int
    name: str
    line: str
    folder: str
    result: Result
    correct: NDArray[np.float64] | None
    settings: str

    def cells(self, difference: Estimate | None, reference: bool) -> list[str]:
        """Return the cells of the table, in the order of ``COLUMNS``."""
        best = own_validation(self.result)
        return [
            str(self.number),
            *_named(self.result)[:3],
            self.result.get("trained_on") or "",
            str(seed_of(self.result)),
            self.settings,
            self.kind,
            "" if best is None else f"{100 * best['accuracy']:.2f}",
            f"{100 * self.result['accuracy']:.2f} ± {100 * self.result['ci95']:.2f}",
            "reference" if reference else "" if difference is None else _signed(difference),
            f"{self.result['episodes']:,}",
            _time(self.result.get("train_seconds")),
            "" if self.milliseconds is None else f"{self.milliseconds:.2f}",
            "" if self.parameters is None else f"{self.parameters:,}",
            self.folder,
        ]

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the encoder."""
        return self.result.get("encoder_parameters")

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return KINDS[bool(self.result.get("transductive")) + bool(self.result.get("assumes_balance"))]

    @property
    def milliseconds(self) -> float | None:
        """Time that the method takes for a test episode."""
        seconds = self.result.get("test_seconds_per_episode")
        return None if seconds is None else 1000 * seconds

    @property
    def episodes(self) -> tuple[Any, ...] | None:
        """Identifies the test episodes: equal for runs tested on the same ones, or on the first of them; or None."""
        data = self.result.get("data")
        if data is None or self.result["config"].get("eval_seed") is None:
            return None
        return (
            *(self.result.get(key) for key in ("dataset", "way", "shot", "query", "concentration")),
            *(self.result["config"]["eval_seed"], data["class_names_sha256"].get("test"), data["images_sha256"]),
            self.result.get("left_out_classes") or [],
        )


COLUMNS = (
    *("run", *NAMED[:3], "trained on", "seed", "settings", "kind", "validation", "accuracy"),
    *("difference", "episodes", "time", "ms/episode", "parameters", "folder"),
)
NUMBERS = ("run", "seed", "validation", "accuracy", "difference", "episodes", "time", "ms/episode", "parameters")


@dataclass(frozen=True)
class Task:
    """Runs with the same data set and test task.

    Attributes:
        data: the data set, with its split.
        short: way, shot, and whether queries are unbalanced.
        runs: its runs.
        reference: the run that the others are compared with.
        differences: of each run from the reference, a fraction; None where there are no equal episodes to compare on.
        notes: why there are none, one line for each run.
    """

    data: str
    short: str
    runs: Sequence[Run]
    reference: Run
    differences: Sequence[Estimate | None]
    notes: Sequence[str]

    @property
    def title(self) -> str:
        """Data set and task."""
        return f"{self.data}, {self.short}"

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """The columns that are not empty, and their rows."""
        filled = [
            position
            for position, column in enumerate(COLUMNS)
            if any(row[position] != (KINDS[0] if column == "kind" else "") for row in self.rows)
        ]
        return [COLUMNS[position] for position in filled], [[row[p] for p in filled] for row in self.rows]

    @property
    def rows(self) -> list[list[str]]:
        """The table, with all ``COLUMNS``."""
        pairs = zip(self.runs, self.differences, strict=True)
        return [run.cells(difference, run is self.reference) for run, difference in pairs]


def compare(runs: str | Sequence[str], reference: str | None, out: str) -> list[Path]:
    """Compare runs, and write ``compare.html``, ``compare.md`` and ``compare.png``.

    Where evaluations record how long their methods take, ``time.png`` shows accuracy against time, too.

    Args:
        runs: directories of runs, evaluations or sweeps, or ``results.json`` files.
        reference: the directory of the run that the others of its task are compared with; None: the first of each task.
        out: output directory, created if missing.

    Returns:
        The files written.

    Raises:
        FewShotError: there are no results, or no run in ``reference``.
    """
    found = read_runs(runs, evaluations=True)
    tasks = collect(found, None if reference is None else Path(reference).expanduser())
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    page, text, picture = (folder / f"compare.{kind}" for kind in ("html", "md", "png"))
    draw(tasks).savefig(picture, dpi=DPI)
    times = []
    for figure in draw_times(tasks):  # one or none
        times.append(folder / "time.png")
        figure.savefig(times[-1], dpi=DPI)
    page.write_text(as_html(tasks), encoding="utf-8")
    text.write_text(as_markdown(tasks), encoding="utf-8")
    for task in tasks:
        timed = "ms/episode" in task.table[0]
        short = [column for column in SHORT if column in task.table[0] and (column != "time" or not timed)]
        shown = [COLUMNS.index(column) for column in short]
        rows = [[row[position] for position in shown] for row in task.rows]
        for row, run in zip(rows, task.runs, strict=True):
            row.insert(1, cut(run.name, 60))
        say(make_table(task.title, [short[0], "name", *short[1:]], rows, numbers=NUMBERS), *task.notes)
    say(page, text, picture, *times)
    return [page, text, picture, *times]


def collect(found: dict[Path, Result], reference: Path | None = None) -> list[Task]:
    """Sort runs into tasks and compute the paired differences.

    Args:
        found: results by the path of their file.
        reference: see ``compare``.

    Raises:
        FewShotError: no result is in ``reference``.
    """
    chosen = None if reference is None else reference.resolve()
    if chosen is not None and chosen not in {path.parent for path in found} | set(found):
        raise FewShotError(f"reference={reference} is not the directory of any of these runs; add it to them")
    common = Path(os.path.commonpath([path.parent.parent for path in found]))
    titles: dict[tuple[str, str], list[Path]] = {}
    for path, result in found.items():
        titles.setdefault(_task(result), []).append(path)
    numbers = {path: number for number, path in enumerate((path for paths in titles.values() for path in paths), 1)}
    lines = dict(zip(found, _lines(list(found.values())), strict=True))
    tasks = []
    for (data, short), paths in titles.items():
        changes = [_changes(changed) for changed in differing([found[path] for path in paths])]
        runs = {
            path: Run(
                numbers[path],
                name,
                lines[path],
                str(path.parent.relative_to(common)),
                found[path],
                read_episodes(path, found[path]),
                changed,
            )
            for path, name, changed in zip(paths, _lines([found[path] for path in paths]), changes, strict=True)
        }
        members = list(runs.values())
        named = (run for path, run in runs.items() if chosen in (path, path.parent))
        tasks.append(_compare(data, short, members, next(named, members[0])))
    return tasks


def as_markdown(tasks: Sequence[Task]) -> str:
    """Format the tables as Markdown, with the figures."""
    lines = []
    for title, columns, rows, notes in _tables(tasks):
        lines += [f"**{for_markdown(title)}**", ""]
        lines += [f"| {' | '.join(map(for_markdown, columns))} |"]
        lines += [f"| {' | '.join('---:' if _is_number(column) else '---' for column in columns)} |"]
        lines += [f"| {' | '.join(map(for_markdown, row))} |" for row in rows]
        lines += ["", *(f"- {for_markdown(note)}" for note in notes), ""]
    lines += [EXPLANATION, "", "![Accuracy, difference, time and parameters](compare.png)", ""]
    return "\n".join([*lines, *("![Accuracy against time](time.png)\n" for _ in draw_times(tasks))])


def as_html(tasks: Sequence[Task]) -> str:
    """Format the tables and the figures as one page without scripts or other files."""
    pictures = []
    for figure in (draw(tasks), *draw_times(tasks)):
        figure.savefig(picture := BytesIO(), format="png", dpi=DPI)
        pictures.append(base64.b64encode(picture.getvalue()).decode())
    notes = [f"<p>{for_html(note)}</p>" for task in tasks for note in task.notes]
    return PAGE.format(
        tables="\n".join(
            line for title, columns, rows, _ in _tables(tasks) for line in _html_table(title, columns, rows)
        ),
        explanation=for_html(EXPLANATION),
        notes="\n".join(notes),
        figures="\n".join(
            f'<img alt="Accuracy and time of each run" src="data:image/png;base64,{picture}">' for picture in pictures
        ),
    )


def draw(tasks: Sequence[Task]) -> Figure:
    """Draw accuracy, difference, time and parameters of each run, one row per run and one block per task.

    Of very many runs, not all are named.
    """
    sizes = [len(task.runs) for task in tasks]
    height, step = fit_rows(0.3 * sum(sizes))
    with mpl.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(WIDTH, height + 0.95 * len(tasks) + 0.2), layout="constrained")
        blocks = figure.subplots(
            len(tasks), 4, squeeze=False, height_ratios=[size + 2 for size in sizes], width_ratios=(1.4, 1.4, 1, 1)
        )
        for task, (accuracy, difference, seconds, parameters) in zip(tasks, blocks, strict=True):
            rows = np.arange(len(task.runs))
            marks: Any = {"fmt": "o", "color": COLOURS[0], "capsize": 2, "markersize": 5}
            results = [run.result for run in task.runs]
            values = [100 * np.array([result[key] for result in results]) for key in ("accuracy", "ci95")]
            accuracy.errorbar(values[0], rows, xerr=values[1], **marks)
            compared = [(row, found) for row, found in enumerate(task.differences) if found is not None]
            if compared:
                means, halves = (100 * np.array([found[position] for _, found in compared]) for position in (0, 1))
                difference.errorbar(means, [row for row, _ in compared], xerr=halves, **marks)
                difference.axvline(0, color=COLOURS[4], linewidth=1)
            else:
                difference.text(0.5, 0.5, "no pairs", ha="center", va="center", transform=difference.transAxes)
                difference.set_xticks([])
            minutes = [(run.result.get("train_seconds") or np.nan) / 60 for run in task.runs]
            seconds.barh(rows, minutes, 0.6, color=COLOURS[5])
            parameters.barh(rows, [(run.parameters or np.nan) / 1e6 for run in task.runs], 0.6, color=COLOURS[6])
            names = [for_figure(f"{cut(run.name, 40)}  {run.number}") for run in task.runs[::step]]
            for axes, label in (
                (accuracy, "accuracy, %"),
                (difference, f"difference from {task.reference.number}"),
                (seconds, "time, min"),
                (parameters, "parameters, M"),
            ):
                axes.set(xlabel=label, ylim=(len(task.runs) - 0.4, -0.6))
                axes.set_yticks(rows[::step], names if axes is accuracy else [""] * len(names))
                axes.locator_params(axis="x", nbins=4)
            accuracy.set_title(for_figure(cut(task.title, 60)), loc="left")
    return figure


def draw_times(tasks: Sequence[Task]) -> list[Figure]:
    """Draw accuracy against the time for an episode, a panel per task: one figure, or none without times to compare."""
    timed = [task for task in tasks if sum(run.milliseconds is not None for run in task.runs) > 1]
    if not timed:
        return []
    lines = list(dict.fromkeys(run.line for task in timed for run in task.runs))
    columns = min(2, len(timed))
    rows = -(-len(timed) // columns)
    with mpl.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(WIDTH, 2.4 * rows + 0.07 * len(lines) + 0.8), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
        handles = {}
        for axes, task in zip(panels.flat, timed, strict=False):
            for run in task.runs:
                if run.milliseconds is not None:
                    number = KINDS.index(run.kind)
                    handles[run.line] = axes.errorbar(
                        run.milliseconds,
                        100 * run.result["accuracy"],
                        yerr=100 * run.result["ci95"],
                        fmt=MANY[lines.index(run.line) % len(MANY)],
                        color=COLOURS[number],
                        markerfacecolor="none" if number == 2 else COLOURS[number],
                        markersize=6,
                        label=for_figure(cut(run.line, 36)),
                    )
            axes.set(xscale="log", ylabel="accuracy, %")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(for_figure(cut(task.title, 60)), loc="left", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("ms per episode")
        for axes in panels.flat[len(timed) :]:
            axes.set_visible(False)
        shown = [KINDS.index(kind) for kind in dict.fromkeys(run.kind for task in timed for run in task.runs)]
        kinds = [Patch(fill=number < 2, color=COLOURS[number], label=KINDS[number]) for number in sorted(shown)]
        figure.legend(handles=[*handles.values(), *kinds], loc="outside lower center", ncols=3)
    return [figure]


def _tables(tasks: Sequence[Task]) -> Iterator[tuple[str, list[str], list[list[str]], Sequence[str]]]:
    """Yield title, columns, rows and notes of each table: what was tested on several tasks, then each task."""
    yield from _summaries(tasks)
    for task in tasks:
        yield (task.title, *task.table, task.notes)


def _summaries(tasks: Sequence[Task]) -> Iterator[tuple[str, list[str], list[list[str]], Sequence[str]]]:
    """Yield a table of accuracies and one of times, a row per method and a column per task of a data set."""
    for data in dict.fromkeys(task.data for task in tasks):
        members = [task for task in tasks if task.data == data]
        cells: dict[str, dict[str, Run]] = {}
        for task in members:
            for run in task.runs:
                if is_evaluation(run.result):
                    cells.setdefault(run.line, {}).setdefault(task.short, run)
        if not any(len(row) > 1 for row in cells.values()):
            continue
        titles = [task.short for task in members]
        for what in ("accuracy, %", "milliseconds per episode"):
            rows = []
            for line, row in cells.items():
                kinds = dict.fromkeys(run.kind for run in row.values())
                numbers = dict.fromkeys(f"{run.result['episodes']:,}" for run in row.values())
                shown = [
                    ""
                    if title not in row
                    else f"{100 * row[title].result['accuracy']:.2f} ± {100 * row[title].result['ci95']:.2f}"
                    if what == "accuracy, %"
                    else f"{row[title].milliseconds:.2f}"
                    if row[title].milliseconds is not None
                    else ""
                    for title in titles
                ]
                rows.append([line, ", ".join(kinds), ", ".join(numbers), *shown])
            if any(cell for row in rows for cell in row[3:]):
                yield f"{data}: {what}", ["method", "kind", "episodes", *titles], rows, ()


def _is_number(column: str) -> bool:
    return column in NUMBERS or "-way " in column


def _named(result: Result) -> list[str]:
    return [*(str(result.get(key) or "") for key in NAMED[:3]), f"seed {seed_of(result)}"]


def _lines(results: Sequence[Result]) -> list[str]:
    """Name each run by its method and what else differs between them, apart from their tasks."""
    changes = [_changes(changed) for changed in differing(results)]
    labels = [
        [*_named(result), f"trained on {result['trained_on']}" if result.get("trained_on") else ""]
        for result in results
    ]
    varied = [position for position, values in enumerate(zip(*labels, strict=True)) if len(set(values)) > 1]
    return [
        " ".join(filter(None, [*(label[position] for position in sorted({0, *varied})), changed]))
        for label, changed in zip(labels, changes, strict=True)
    ]


def _changes(overrides: Mapping[str, str]) -> str:
    """Return overrides in one line; of an experiment or another group, only the name of the option."""
    shown = {
        key: value if key == "checkpoint" else value.rpartition("/")[2]
        for key, value in overrides.items()
        if value and key not in HIDDEN
    }
    return " ".join(value if "experiment" in key else f"{key}={value}" for key, value in shown.items())


def _task(result: Result) -> tuple[str, str]:
    """Return the data set with its split, and the task of the test."""
    split = split_of(result)
    rule = f" ({split})" if split else ""
    drawn = result.get("concentration")
    unbalanced = "" if drawn is None else f", unbalanced ({drawn:g})"
    return f"{result['dataset']}{rule}", f"{result['way']}-way {result['shot']}-shot{unbalanced}"


def _compare(data: str, short: str, runs: Sequence[Run], reference: Run) -> Task:
    differences: list[Estimate | None] = []
    reasons: dict[str, list[int]] = {}
    shared: dict[int, list[int]] = {}
    for run in runs:
        difference = None
        why = None if run is reference else _not_paired(run, reference)
        if why is not None:
            reasons.setdefault(why, []).append(run.number)
        elif run is not reference:
            assert run.correct is not None
            assert reference.correct is not None
            both = min(len(run.correct), len(reference.correct))
            if len(run.correct) != len(reference.correct):
                shared.setdefault(both, []).append(run.number)
            queries = run.result["way"] * run.result["query"]
            difference = paired_difference(run.correct[:both], reference.correct[:both], queries)
        differences.append(difference)
    notes = [
        f"Run {', '.join(map(str, numbers))}: no difference from run {reference.number}, because {why}."
        for why, numbers in reasons.items()
    ]
    notes += [
        f"Run {', '.join(map(str, numbers))}: the difference is that on the first {both:,} episodes, which run "
        f"{reference.number} has in common."
        for both, numbers in shared.items()
    ]
    return Task(data, short, runs, reference, differences, notes)


def _not_paired(run: Run, reference: Run) -> str | None:
    """Return why two runs cannot be compared episode by episode, or None."""
    if run.episodes is None or reference.episodes is None:
        return "the results do not record their data"
    if run.episodes != reference.episodes:
        return "the test episodes differ (images, query, concentration or eval_seed)"
    for other, name in ((run, "the run"), (reference, "the reference")):
        if other.correct is None:
            return f"{name} has no valid {EPISODES}; fewshot evaluate checkpoint=RUN_DIR writes one"
    return None


def _html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    marks = [" class=number" if _is_number(column) else "" for column in columns]
    yield f"<h2>{for_html(title)}</h2>"
    yield "<div><table>"
    for tag, cells in (("th", columns), *(("td", row) for row in rows)):
        shown = (f"<{tag}{mark}>{for_html(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        yield f"<tr>{''.join(shown)}</tr>"
    yield "</table></div>"


def _signed(difference: Estimate) -> str:
    mean, half = 100 * difference.accuracy, 100 * difference.ci95
    return f"{mean:+.2f} ± {half:.2f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
