"""Compare any runs and sweeps: one table and one figure, as a page to open and as Markdown to paste."""

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
from numpy.typing import NDArray

from fewshot.errors import FewShotError
from fewshot.metrics import Estimate, paired_difference
from fewshot.results import EPISODES, Result, best_validation, read_episodes, read_runs, seed_of, split_of
from fewshot.style import COLOURS, DPI, STYLE, WIDTH
from fewshot.sweeps import differing
from fewshot.text import cut, for_figure, for_html, for_markdown, make_table, say

NAMED = ("method", "distance", "encoder", "seed")  # settings with a column
# Overrides that another column shows, or that do not affect accuracy.
HIDDEN = {*NAMED, *("dataset", "way", "shot", "test.episodes", "hydra.run.dir", "run_dir", "logger", "pictures")}
EXPLANATION = (
    "Accuracy in % on test classes with its 95% interval over the episodes. Difference: accuracy minus that of the "
    "reference, in percentage points, episode by episode on the same episodes, with its 95% interval. "
    "Time: of the training, without validation and test. Parameters: of the encoder."
)
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
<img alt="Accuracy, difference, time and parameters of each run" src="data:image/png;base64,{figure}">
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
        right: its right answers in each test episode; None if they are unknown.
        name: its method, and what else differs between the runs of the task.
        settings: its overrides that differ between the runs of the task, unless a column shows them.
    """

    number: int
    name: str
    folder: str
    result: Result
    right: NDArray[np.float64] | None
    settings: str

    def cells(self, difference: Estimate | None, reference: bool) -> list[str]:
        """Return the cells of the table, in the order of ``COLUMNS``."""
        best = best_validation(self.result)
        return [
            str(self.number),
            *_named(self.result)[:3],
            str(seed_of(self.result)),
            self.settings,
            "" if best is None else f"{100 * best['accuracy']:.2f}",
            f"{100 * self.result['accuracy']:.2f} ± {100 * self.result['ci95']:.2f}",
            "reference" if reference else "" if difference is None else _signed(difference),
            f"{self.result['episodes']:,}",
            _time(self.result["train_seconds"]),
            "" if self.parameters is None else f"{self.parameters:,}",
            self.folder,
        ]

    @property
    def parameters(self) -> int | None:
        """Number of parameters of the encoder."""
        return self.result.get("encoder_parameters")

    @property
    def episodes(self) -> tuple[Any, ...] | None:
        """Identifies the test episodes: equal for runs tested on the same ones; None if unknown."""
        data = self.result.get("data")
        if data is None or self.result["config"].get("eval_seed") is None:
            return None
        return (
            *(self.result.get(key) for key in ("dataset", "way", "shot", "query", "episodes", "concentration")),
            *(self.result["config"]["eval_seed"], data["class_names_sha256"].get("test"), data["images_sha256"]),
            self.result.get("left_out_classes") or [],
        )


COLUMNS = (
    *("run", *NAMED, "settings", "validation", "accuracy"),
    *("difference", "episodes", "time", "parameters", "folder"),
)
NUMBERS = ("run", "seed", "validation", "accuracy", "difference", "episodes", "time", "parameters")


@dataclass(frozen=True)
class Task:
    """Runs with the same data set and test task.

    Attributes:
        title: data set and task.
        runs: its runs.
        reference: the run that the others are compared with.
        differences: of each run from the reference, a fraction; None where there are no equal episodes to compare on.
        notes: why there are none, one line for each run.
    """

    title: str
    runs: Sequence[Run]
    reference: Run
    differences: Sequence[Estimate | None]
    notes: Sequence[str]

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """The columns that are not empty, and their rows."""
        filled = [position for position in range(len(COLUMNS)) if any(row[position] for row in self.rows)]
        return [COLUMNS[position] for position in filled], [[row[p] for p in filled] for row in self.rows]

    @property
    def rows(self) -> list[list[str]]:
        """The table, with all ``COLUMNS``."""
        pairs = zip(self.runs, self.differences, strict=True)
        return [run.cells(difference, run is self.reference) for run, difference in pairs]


def compare(runs: str | Sequence[str], reference: str | None, out: str) -> list[Path]:
    """Compare runs, and write ``compare.html``, ``compare.md`` and ``compare.png``.

    Args:
        runs: directories of runs or sweeps, or ``results.json`` files.
        reference: the directory of the run that the others of its task are compared with; None: the first of each task.
        out: output directory, created if missing.

    Returns:
        The files written.

    Raises:
        FewShotError: there are no results, or no run in ``reference``.
    """
    tasks = collect(read_runs(runs), None if reference is None else Path(reference).expanduser())
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    page, text, picture = (folder / f"compare.{kind}" for kind in ("html", "md", "png"))
    draw(tasks).savefig(picture, dpi=DPI)
    page.write_text(as_html(tasks), encoding="utf-8")
    text.write_text(as_markdown(tasks), encoding="utf-8")
    for task in tasks:
        short = ("run", "name", "accuracy", "difference", "time")
        shown = [COLUMNS.index(column) for column in short if column != "name"]
        rows = [[row[position] for position in shown] for row in task.rows]
        for row, run in zip(rows, task.runs, strict=True):
            row.insert(1, cut(run.name, 60))
        say(make_table(task.title, short, rows, numbers=NUMBERS), *task.notes)
    say(page, text, picture)
    return [page, text, picture]


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
    titles: dict[str, list[Path]] = {}
    for path, result in found.items():
        titles.setdefault(_task(result), []).append(path)
    numbers = {path: number for number, path in enumerate((path for paths in titles.values() for path in paths), 1)}
    tasks = []
    for title, paths in titles.items():
        changes = [_changes(changed) for changed in differing([found[path] for path in paths])]
        labels = [_named(found[path]) for path in paths]
        varied = [position for position, values in enumerate(zip(*labels, strict=True)) if len(set(values)) > 1]
        runs = {
            path: Run(
                numbers[path],
                " ".join(filter(None, [*(label[position] for position in sorted({0, *varied})), changed])),
                str(path.parent.relative_to(common)),
                found[path],
                read_episodes(path, found[path]),
                changed,
            )
            for path, label, changed in zip(paths, labels, changes, strict=True)
        }
        members = list(runs.values())
        named = (run for path, run in runs.items() if chosen in (path, path.parent))
        tasks.append(_compare(title, members, next(named, members[0])))
    return tasks


def as_markdown(tasks: Sequence[Task]) -> str:
    """Format the tables as Markdown, with the figure."""
    lines = []
    for task in tasks:
        columns, rows = task.table
        lines += [f"**{for_markdown(task.title)}**", ""]
        lines += [f"| {' | '.join(columns)} |", f"| {' | '.join('---:' if c in NUMBERS else '---' for c in columns)} |"]
        lines += [f"| {' | '.join(map(for_markdown, row))} |" for row in rows]
        lines += ["", *(f"- {for_markdown(note)}" for note in task.notes), ""]
    return "\n".join([*lines, EXPLANATION, "", "![Accuracy, difference, time and parameters](compare.png)", ""])


def as_html(tasks: Sequence[Task]) -> str:
    """Format the tables and the figure as one page without scripts or other files."""
    picture = BytesIO()
    draw(tasks).savefig(picture, format="png", dpi=DPI)
    notes = [f"<p>{for_html(note)}</p>" for task in tasks for note in task.notes]
    return PAGE.format(
        tables="\n".join(line for task in tasks for line in _html_table(task)),
        explanation=for_html(EXPLANATION),
        notes="\n".join(notes),
        figure=base64.b64encode(picture.getvalue()).decode(),
    )


def draw(tasks: Sequence[Task]) -> Figure:
    """Draw accuracy, difference, time and parameters of each run, one row per run and one block per task."""
    sizes = [len(task.runs) for task in tasks]
    with mpl.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(WIDTH, 0.3 * sum(sizes) + 0.95 * len(tasks) + 0.2), layout="constrained")
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
            seconds.barh(rows, [run.result["train_seconds"] / 60 for run in task.runs], 0.6, color=COLOURS[5])
            parameters.barh(rows, [(run.parameters or np.nan) / 1e6 for run in task.runs], 0.6, color=COLOURS[6])
            names = [for_figure(f"{cut(run.name, 40)}  {run.number}") for run in task.runs]
            for axes, label in (
                (accuracy, "accuracy, %"),
                (difference, f"difference from {task.reference.number}"),
                (seconds, "time, min"),
                (parameters, "parameters, M"),
            ):
                axes.set(xlabel=label, ylim=(len(task.runs) - 0.4, -0.6))
                axes.set_yticks(rows, names if axes is accuracy else [""] * len(names))
                axes.locator_params(axis="x", nbins=4)
            accuracy.set_title(for_figure(cut(task.title, 60)), loc="left")
    return figure


def _named(result: Result) -> list[str]:
    return [*(str(result.get(key) or "") for key in NAMED[:3]), f"seed {seed_of(result)}"]


def _changes(overrides: Mapping[str, str]) -> str:
    """Return overrides in one line; of an experiment or another group, only the name of the option."""
    shown = {key: value.rpartition("/")[2] for key, value in overrides.items() if value and key not in HIDDEN}
    return " ".join(value if "experiment" in key else f"{key}={value}" for key, value in shown.items())


def _task(result: Result) -> str:
    """Return the data set, its split, and the task of the test."""
    split = split_of(result)
    rule = f" ({split})" if split else ""
    return f"{result['dataset']}{rule}, {result['way']}-way {result['shot']}-shot"


def _compare(title: str, runs: Sequence[Run], reference: Run) -> Task:
    differences: list[Estimate | None] = []
    reasons: dict[str, list[int]] = {}
    for run in runs:
        difference = None
        why = None if run is reference else _not_paired(run, reference)
        if why is not None:
            reasons.setdefault(why, []).append(run.number)
        elif run is not reference:
            assert run.right is not None
            assert reference.right is not None
            difference = paired_difference(run.right, reference.right, run.result["way"] * run.result["query"])
        differences.append(difference)
    notes = [
        f"Run {', '.join(map(str, numbers))}: no difference from run {reference.number}, because {why}."
        for why, numbers in reasons.items()
    ]
    return Task(title, runs, reference, differences, notes)


def _not_paired(run: Run, reference: Run) -> str | None:
    """Return why two runs cannot be compared episode by episode, or None."""
    if run.episodes is None or reference.episodes is None:
        return "the results do not record their data"
    if run.episodes != reference.episodes:
        return "the test episodes differ (images, query, concentration, eval_seed or number of episodes)"
    for other, name in ((run, "the run"), (reference, "the reference")):
        if other.right is None:
            return f"{name} has no valid {EPISODES}; fewshot evaluate checkpoint=RUN_DIR writes one"
    return None


def _html_table(task: Task) -> Iterator[str]:
    columns, rows = task.table
    marks = [" class=number" if column in NUMBERS else "" for column in columns]
    yield f"<h2>{for_html(task.title)}</h2>"
    yield "<div><table>"
    for tag, cells in (("th", columns), *(("td", row) for row in rows)):
        shown = (f"<{tag}{mark}>{for_html(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        yield f"<tr>{''.join(shown)}</tr>"
    yield "</table></div>"


def _signed(difference: Estimate) -> str:
    mean, half = 100 * difference.accuracy, 100 * difference.ci95
    return f"{mean:+.2f} ± {half:.2f}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
