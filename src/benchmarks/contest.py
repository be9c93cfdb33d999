"""Contests between programs that compute the same: each in a process of its own, taking turns."""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from fewshot.errors import FewShotError
from fewshot.hardware import keep_freed_memory, machine
from fewshot.text import make_table, say

# Does the work once, and returns the numbers that the others must find too.
Work = Callable[[], NDArray[Any]]
# What a build function returns: the work, and what has to go on in the main thread for it, if anything has.
Built = Work | tuple[Work, Callable[[], None]]


@dataclass(frozen=True)
class Entrant:
    """One of the programs.

    Attributes:
        name: as the table shows it.
        build: a module's function; makes the work from the settings, in the entrant's own process.
        settings: its arguments.
        keep_memory: whether the process keeps freed memory, as ours does by itself.
    """

    name: str
    build: Callable[..., Built]
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep_memory: bool = False


@dataclass(frozen=True)
class Contest:
    """Programs that compute the same, ours first.

    Attributes:
        title: what is computed.
        entrants: the programs.
        items: how many the work handles, and what they are called, for a rate.
        tolerance: the largest difference of results, over the norm of ours.
        pause: seconds before each turn, for what an entrant still does in the background after its own.
        rounds: of this contest, if not as many as of the others.
    """

    title: str
    entrants: Sequence[Entrant]
    items: tuple[int, str] | None = None
    tolerance: float = 1e-3
    pause: float = 0.0
    rounds: int | None = None


def run(contest: Contest, rounds: int) -> list[dict[str, Any]]:
    """Check that all entrants find the same, then time them in turn, the order reversed every other round.

    Args:
        contest: who competes.
        rounds: how often each one works.

    Returns:
        For each entrant its name, the ``seconds`` of each round, their ``median``, the ``ratio`` of that to the first
        one's, and ``peak_bytes``, the most memory its process held beyond that of the loaded libraries.

    Raises:
        FewShotError: an entrant failed, or found something else than the first.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    scratch = tempfile.TemporaryDirectory(prefix="fewshot-bench-")
    results = []
    try:
        for entrant in contest.entrants:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, entrant, scratch.name))
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
            results.append(_ask(here, entrant, "result"))  # before the next starts
        _compare(contest, results)
        seconds: list[list[float]] = [[] for _ in pipes]
        for number in track(range(contest.rounds or rounds), contest.title, transient=True):
            order = range(len(pipes)) if number % 2 == 0 else reversed(range(len(pipes)))
            for position in order:
                time.sleep(contest.pause)
                seconds[position].append(_ask(pipes[position], contest.entrants[position], "seconds"))
        peaks = [_ask(pipe, entrant, "peak") for pipe, entrant in zip(pipes, contest.entrants, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        scratch.cleanup()
    medians = [statistics.median(of) for of in seconds]
    return [
        {
            "name": entrant.name,
            "seconds": of,
            "median": median,
            "ratio": median / medians[0],
            "peak_bytes": peak,
        }
        for entrant, of, median, peak in zip(contest.entrants, seconds, medians, peaks, strict=True)
    ]


def tell(contest: Contest, found: Sequence[Mapping[str, Any]]) -> None:
    """Print a contest's table."""
    numbers = (*([f"{contest.items[1]}/s"] if contest.items else []), "median", "range", "times ours", "MiB")
    rows = []
    for of in found:
        rate = [f"{contest.items[0] / of['median']:.3g}"] if contest.items else []
        spread = f"{_duration(min(of['seconds']))} to {_duration(max(of['seconds']))}"
        memory = f"{of['peak_bytes'] / 2**20:,.0f}"
        rows.append([of["name"], *rate, _duration(of["median"]), spread, f"{of['ratio']:.2f}", memory])
    say(make_table(contest.title, ["", *numbers], rows, numbers))


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def bench(contests: Mapping[str, Contest], rounds: int, out: Path) -> None:
    """Run contests one after another; print a table of each and write all to ``out``.

    Args:
        contests: by name.
        rounds: of each.
        out: a JSON file, rewritten after each contest.
    """
    report: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": {"python": python_version(), **{name: version(name) for name in ("torch", "pytorch-lightning")}},
        "rounds": rounds,
        "contests": {},
    }
    for name, contest in contests.items():
        found = run(contest, rounds)
        tell(contest, found)
        report["contests"][name] = {"title": contest.title, "entrants": found}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _serve(pipe: Connection, entrant: Entrant, scratch: str) -> None:
    """Be an entrant: build, work once for the result, then work whenever asked."""
    tempfile.tempdir = scratch
    try:
        if entrant.keep_memory:
            keep_freed_memory()
        before = _most_memory()
        built = entrant.build(**entrant.settings)
        if isinstance(built, tuple):
            work, stay = built
            threading.Thread(target=_answer, args=(pipe, work, before), daemon=True).start()
            stay()
        else:
            _answer(pipe, built, before)
    except KeyboardInterrupt:
        os._exit(0)  # the contest is over
    except Exception as error:
        _fail(pipe, error)


def _answer(pipe: Connection, work: Work, before: int) -> None:
    try:
        pipe.send(("result", work()))
        while True:
            wanted = pipe.recv()
            if wanted == "peak":
                pipe.send((wanted, _most_memory() - before))
            else:
                start = time.perf_counter()
                work()
                pipe.send((wanted, time.perf_counter() - start))
    except EOFError:
        os._exit(0)  # the contest is over
    except Exception as error:
        _fail(pipe, error)


def _fail(pipe: Connection, error: Exception) -> None:
    traceback.print_exc()
    pipe.send(("error", repr(error)))


def _most_memory() -> int:
    """The most this process ever held, in bytes."""
    try:  # the kernel's own record: that of getrusage begins with what the parent held
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _ask(pipe: Connection, entrant: Entrant, wanted: str) -> Any:
    if wanted != "result":
        pipe.send(wanted)
    try:
        kind, answer = pipe.recv()
    except EOFError:
        kind, answer = "error", "its process ended; it may have run out of memory"
    if kind == "error":
        raise FewShotError(f"the benchmark's entrant {entrant.name!r} failed: {answer}")
    return answer


def _compare(contest: Contest, results: Sequence[NDArray[Any]]) -> None:
    ours = results[0]
    for entrant, found in zip(contest.entrants[1:], results[1:], strict=True):
        miss = float(np.linalg.norm(np.subtract(found, ours, dtype=float)) / np.linalg.norm(ours))
        if not miss <= contest.tolerance:
            raise FewShotError(
                f"{contest.title}: {entrant.name!r} computes something else than {contest.entrants[0].name!r}; "
                f"they differ by {miss:.2g} of the norm"
            )
