"""Sweep summary: tables, a figure and the failed jobs, whichever process or machine they ran on."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from math import isnan, nan
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from fewshot.config import SWEPT, options, search_path
from fewshot.files import write_atomically
from fewshot.results import Result, find_results, is_evaluation, natural, own_validation
from fewshot.style import COLOURS, STYLE, fit_rows
from fewshot.text import for_csv, for_figure, make_table, say

FAILURE = "failure.txt"  # in the directory of a failed job: why it failed


class Sweep(Callback):
    """Hydra callback around a sweep.

    Jobs may run on other machines, so everything known about them comes from files in the sweep's directory.

    Attributes:
        folder: directory of the sweep that this process started; None: no sweep.
        again: overrides to add to the command line to resume the sweep.
    """

    folder: ClassVar[Path | None] = None
    again: ClassVar[str] = ""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Delete the failure notes of a resumed sweep; reject what cannot work in any of its jobs."""
        if str(OmegaConf.select(config, "hydra.sweeper.direction")).endswith("minimize"):
            raise SystemExit(
                "error: hydra.sweeper.direction=minimize searches for the lowest validation accuracy; choose "
                "hydra/sweeper=search, or hydra.sweeper.direction=maximize"
            )
        for override in _overrides(config):
            if override.key_or_group == "out" and not override.is_sweep_override():
                raise SystemExit(
                    f"error: {override.input_line}: every job of the sweep would write there; leave it out, and "
                    "name the directory of the sweep with hydra.sweep.dir=PATH"
                )
            group, chosen = override.key_or_group, override.value()
            available = [name for source in search_path() for name in options(source, group) if "/" not in name]
            if isinstance(chosen, Glob) and not chosen.filter(available):
                raise SystemExit(f"error: {override.input_line} matches none of {', '.join(available)}")
        os.environ[SWEPT] = ",".join(_swept(config))
        Sweep.folder = Path(config.hydra.sweep.dir).absolute()
        Sweep.again = f"hydra.sweep.dir={config.hydra.sweep.dir}" + (" resume=auto" if "resume" in config else "")
        for note in Sweep.folder.rglob(FAILURE):
            note.unlink()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Print a table, write a longer one, and draw the figure."""
        assert Sweep.folder is not None
        os.environ.pop(SWEPT, None)
        jobs = read_jobs(Sweep.folder)
        if jobs:
            write_atomically(table := Sweep.folder / "results.csv", as_csv(jobs).encode())
            say(tabulate(jobs), f"Drawn in {draw(jobs, Sweep.folder / 'sweep.png')}, written to {table}")


def _swept(config: DictConfig) -> list[str]:
    """Return the keys that a sweep varies."""
    searched = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return [*(line.key_or_group for line in _overrides(config) if line.is_sweep_override()), *map(str, searched)]


def _overrides(config: DictConfig) -> list[Override]:
    overrides = OmegaConf.select(config, "hydra.overrides")
    # An interpolation has no value before there are jobs.
    written: Any = OmegaConf.to_container(overrides) if overrides else {}
    return OverridesParser.create().parse_overrides(written.get("task", []))


def failures(folder: Path) -> list[str]:
    """Return one line for each failed job of a sweep, with the reason."""
    return [note.read_text(encoding="utf-8", errors="replace") for note in sorted(folder.rglob(FAILURE), key=natural)]


@dataclass(frozen=True)
class Job:
    """A finished job of a sweep.

    Attributes:
        name: its directory, relative to the sweep's.
        swept: its value for each key in which the jobs differ; empty if it has none.
        validation: accuracy of the chosen weights and half the width of its 95% interval, in %.
        test: the same for test classes.
        result: its ``results.json``.
    """

    name: str
    swept: Mapping[str, str]
    validation: tuple[float, float]
    test: tuple[float, float]
    result: Result


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs of a sweep that left results, in order. Evaluations of its runs do not count as jobs."""
    found = find_results([folder])
    if not all(map(is_evaluation, found.values())):  # otherwise it is a sweep of evaluations
        found = {path: result for path, result in found.items() if not is_evaluation(result)}
    paths = sorted(found, key=natural)
    return [
        Job(
            name=str(path.parent.relative_to(folder.resolve())),
            swept=swept,
            validation=_percent(own_validation(found[path]) or {}),
            test=_percent(found[path]),
            result=found[path],
        )
        for path, swept in zip(paths, differing([found[path] for path in paths]), strict=True)
    ]


def differing(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return each run's overrides of the keys whose values differ between the runs; "" where a run has none.

    Evaluations also have the key ``checkpoint``, a path below the directory that all have in common.
    """
    settings = [_settings(result) for result in results]
    named = [Path(overrides["checkpoint"]) for overrides in settings if "checkpoint" in overrides]
    common = Path(os.path.commonpath(named)) if named and all(path.is_absolute() for path in named) else None
    for overrides in settings:
        if common is not None and "checkpoint" in overrides and len(set(named)) > 1:
            overrides["checkpoint"] = str(Path(overrides["checkpoint"]).relative_to(common))
    keys = [
        key
        for key in dict.fromkeys(key for overrides in settings for key in overrides)
        if len({overrides.get(key, "") for overrides in settings}) > 1
    ]
    return [{key: overrides.get(key, "") for key in keys} for overrides in settings]


def tabulate(jobs: Sequence[Job]) -> Table:
    """Make a table of the jobs' accuracies by the swept settings."""
    accuracies = ("validation", "test")
    return make_table(
        "The jobs of this sweep: accuracy in %, with its 95% interval",
        ["job", *jobs[0].swept, *accuracies],
        [[job.name, *job.swept.values(), _accuracy(*job.validation), _accuracy(*job.test)] for job in jobs],
        numbers=accuracies,
    )


def as_csv(jobs: Sequence[Job]) -> str:
    """Format the jobs as CSV: what was swept, then everything in their ``results.json`` that is a single value."""
    rows = [
        {"job": job.name, **job.swept}
        | {key: value for key, value in job.result.items() if not isinstance(value, Mapping | list)}
        for job in jobs
    ]
    text = StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writerow({key: for_csv(key) for key in table.fieldnames})
    table.writerows({key: for_csv(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def draw(jobs: Sequence[Job], path: Path) -> Path:
    """Draw the jobs' accuracies, one line per job; return the path. Of very many jobs, not all are named."""
    import matplotlib as mpl  # noqa: PLC0415  slow, and the command line imports this file
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        height, step = fit_rows(0.28 * len(jobs))
        figure = Figure(figsize=(8, height + 1.5), layout="constrained")
        axes = figure.subplots()
        for split, marker, colour, filled, shift in (
            ("validation", "s", COLOURS[1], "none", -0.15),
            ("test", "o", COLOURS[0], COLOURS[0], 0.15),
        ):
            accuracies, intervals = zip(*(getattr(job, split) for job in jobs), strict=True)
            axes.errorbar(
                accuracies,
                [row + shift for row in range(len(jobs))],
                xerr=intervals,
                fmt=marker,
                color=colour,
                markerfacecolor=filled,
                markersize=5,
                capsize=2,
                label=f"{split} classes",
            )
        names = [" ".join(f"{key}={value}" for key, value in job.swept.items()) or job.name for job in jobs]
        axes.set_yticks(range(0, len(jobs), step), map(for_figure, names[::step]))
        axes.set(xlabel="accuracy, %, with its 95% interval", ylim=(len(jobs) - 0.4, -0.6))
        figure.legend(loc="outside upper center", ncols=2)
        figure.savefig(path, dpi=150)
    return path


def _settings(result: Result) -> dict[str, str]:
    """Return the overrides of a run by key, without ``resume``, which is not a setting."""
    pairs = (str(override).lstrip("+~").partition("=") for override in result["overrides"])
    trained = is_evaluation(result) and result.get("weights") != "untrained"
    tested = {"checkpoint": str(result["checkpoint"])} if trained else {}
    return {key: value for key, _, value in pairs if key != "resume"} | tested


def _percent(estimate: Mapping[str, Any]) -> tuple[float, float]:
    return 100 * estimate.get("accuracy", nan), 100 * estimate.get("ci95", nan)


def _accuracy(accuracy: float, interval: float) -> str:
    return "" if isnan(accuracy) else f"{accuracy:.2f}" + ("" if isnan(interval) else f" ± {interval:.2f}")
