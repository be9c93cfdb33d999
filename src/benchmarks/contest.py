"""Contests between programs that compute the same result, each in a separate process, taking turns."""

import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
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

from benchmarks.profiling import busy_seconds, convolution_peak, count, memory_peak
from fewshot.errors import FewShotError
from fewshot.files import write_atomically
from fewshot.hardware import keep_freed_memory, machine
from fewshot.text import make_table, say

GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # the process at the other end of a pipe has ended
# Does the work once, and returns numbers that all entrants must agree on.
Work = Callable[[], NDArray[Any]]
# Returned by build functions: the work, and optionally a function that must run in the main thread meanwhile.
Built = Work | tuple[Work, Callable[[], None]]


@dataclass(frozen=True)
class Entrant:
    """A program in a contest.

    Attributes:
        name: shown in the table.
        build: a module-level function that makes the work from the settings, in the entrant's process.
        settings: arguments of ``build``.
        keep_memory: whether the process keeps freed memory, as our programs do.
    """

    name: str
    build: Callable[..., Built]
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep_memory: bool = False


@dataclass(frozen=True)
class Contest:
    """Programs that compute the same result, ours first.

    Attributes:
        title: what is computed.
        entrants: the programs.
        items: number and name of the items that the work processes, to show a rate.
        tolerance: largest allowed difference of results, relative to the norm of ours.
        pause: seconds before each turn, to let background work of the previous entrant finish.
        counted: position of the entrant whose operations and bytes are counted; it works in one thread. None: of none.
    """

    title: str
    entrants: Sequence[Entrant]
    items: tuple[int, str] | None = None
    tolerance: float = 1e-3
    pause: float = 0.0
    counted: int | None = None


def run(contest: Contest, rounds: int, seconds: float = math.inf) -> list[dict[str, Any]]:
    """Check that all entrants agree, then time them in turn, in reverse order every other round.

    Args:
        contest: the contest.
        rounds: how often each entrant runs, at most.
        seconds: after so many, no round begins; there is always one.

    Returns:
        For each entrant its name, the ``seconds`` of each round, their ``median``, its ``ratio`` to that of the first
        entrant, ``peak_bytes``, the peak memory of its process beyond the loaded libraries (on a GPU, that of its
        tensors), on a GPU ``idle``, the share of the median in which the GPU does nothing, and for the entrant that is
        ``counted`` its ``flops`` and ``bytes``, see ``benchmarks.profiling.count``.

    Raises:
        FewShotError: an entrant failed, or its result differs from the first entrant's.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    scratch = tempfile.TemporaryDirectory(prefix="fewshot-bench-")
    try:
        for entrant in contest.entrants:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, entrant, scratch.name))
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        results = [_ask(pipe, entrant, "result") for pipe, entrant in zip(pipes, contest.entrants, strict=True)]
        _compare(contest, results)
        times: list[list[float]] = [[] for _ in pipes]
        start = time.monotonic()
        for number in track(range(rounds), contest.title, transient=True):
            if number and time.monotonic() - start > seconds:
                break
            order = range(len(pipes)) if number % 2 == 0 else reversed(range(len(pipes)))
            for position in order:
                time.sleep(contest.pause)
                times[position].append(_ask(pipes[position], contest.entrants[position], "seconds"))
        peaks, busy = (
            [_ask(pipe, entrant, request) for pipe, entrant in zip(pipes, contest.entrants, strict=True)]
            for request in ("peak", "busy")
        )
        if contest.counted is not None:
            counts = _ask(pipes[contest.counted], contest.entrants[contest.counted], "count")
    finally:
        for process in processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has no group yet, or has ended
                os.killpg(process.pid, signal.SIGKILL)  # with its DataLoader workers, which write to scratch
            process.kill()
            process.join()
        scratch.cleanup()
    medians = [statistics.median(taken) for taken in times]
    found: list[dict[str, Any]] = [
        {
            "name": entrant.name,
            "seconds": taken,
            "median": median,
            "ratio": median / medians[0],
            "peak_bytes": peak,
            **({} if active is None else {"idle": max(0.0, 1 - active / median)}),
        }
        for entrant, taken, median, peak, active in zip(contest.entrants, times, medians, peaks, busy, strict=True)
    ]
    if contest.counted is not None:
        found[contest.counted] |= dict(zip(("flops", "bytes"), counts, strict=True))
    return found


def show(
    contest: Contest, results: Sequence[Mapping[str, Any]], flops: float | None = None, bandwidth: float | None = None
) -> None:
    """Print the table of a contest, and how long what was counted takes at peak speed.

    Args:
        contest: the contest.
        results: from ``run``.
        flops: the processor's peak, per second.
        bandwidth: that of its memory, in bytes per second.
    """
    rounds = len(results[0]["seconds"])
    on_gpu = ["GPU idle"] if any("idle" in result for result in results) else []
    rates = [f"{contest.items[1]}/s"] if contest.items else []
    numbers = (*rates, "median", "range", "times ours", "MiB", *on_gpu)
    rows = []
    for result in results:
        rate = [f"{contest.items[0] / result['median']:.3g}"] if contest.items else []
        spread = f"{_duration(min(result['seconds']))} to {_duration(max(result['seconds']))}"
        memory = f"{result['peak_bytes'] / 2**20:,.0f}"
        idle = [f"{result['idle']:.0%}"] if on_gpu else []
        times = [_duration(result["median"]), spread, f"{result['ratio']:.2f}"]
        rows.append([result["name"], *rate, *times, memory, *idle])
    title = f"{contest.title}; {rounds} round{'s' if rounds != 1 else ''}"
    say(make_table(title, ["", *numbers], rows, numbers))
    if flops and bandwidth and contest.counted is not None:
        result = results[contest.counted]
        say(
            f"Counted in {result['name']!r}: {result['flops'] / 1e9:.3g} GFLOP, which take "
            f"{_duration(result['flops'] / flops)} at {flops / 1e9:.3g} GFLOP/s, the speed of the fastest convolution; "
            f"{result['bytes'] / 2**30:.3g} GiB read and written, which take {_duration(result['bytes'] / bandwidth)} "
            f"at {bandwidth / 2**30:.3g} GiB/s, the speed of memory"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def bench(contests: Mapping[str, Contest], rounds: int, seconds: float, out: Path, device: str = "cpu") -> None:
    """Run contests one after another; print a table for each and write all results to ``out``.

    Args:
        contests: by name.
        rounds: number of rounds of each, at most.
        seconds: after so many, no round of a contest begins; there is always one.
        out: a JSON file, rewritten after each contest.
        device: what they run on, to record its name.

    Raises:
        FewShotError: ``out`` is a directory.
    """
    if out.is_dir():
        raise FewShotError(f"out={out} is a directory; name a file: out={out / 'bench.json'}")
    report: dict[str, Any] = {
        "machine": machine(torch.device(device)),
        "versions": {"python": python_version(), **{name: version(name) for name in ("torch", "pytorch-lightning")}},
        "rounds": rounds,
        "seconds": seconds,
        "contests": {},
    }
    peaks: tuple[float, ...] = ()
    if any(contest.counted is not None for contest in contests.values()):
        peaks = convolution_peak(rounds), memory_peak(rounds)
        report |= dict(zip(("flops_per_second", "bytes_per_second"), peaks, strict=True))
    for name, contest in contests.items():
        results = run(contest, rounds, seconds)
        show(contest, results, *peaks)
        report["contests"][name] = {"title": contest.title, "entrants": results}
        write_atomically(out, f"{json.dumps(report, indent=1)}\n".encode())


def _serve(pipe: Connection, entrant: Entrant, scratch: str) -> None:
    """Run an entrant's process: build, work once for the result, then work on request."""
    os.setpgrp()  # so that its DataLoader workers can be ended with it
    tempfile.tempdir = scratch
    try:
        if entrant.keep_memory:
            keep_freed_memory()
        before = peak_memory()
        built = entrant.build(**entrant.settings)
        if isinstance(built, tuple):
            work, stay = built
            threading.Thread(target=_answer, args=(pipe, work, before), daemon=True).start()
            stay()
        else:
            _answer(pipe, built, before)
    except Exception as error:
        _fail(pipe, error)


def _answer(pipe: Connection, work: Work, before: int) -> None:
    try:
        pipe.send(("result", work()))
        while True:
            request = pipe.recv()
            if request == "peak":
                on_gpu = torch.cuda.is_initialized()
                pipe.send((request, torch.cuda.max_memory_allocated() if on_gpu else peak_memory() - before))
            elif request == "busy":
                pipe.send((request, busy_seconds(work) if torch.cuda.is_initialized() else None))
            elif request == "count":
                pipe.send((request, count(work)))
            else:
                start = time.perf_counter()
                work()
                pipe.send((request, time.perf_counter() - start))
    except GONE:
        os.killpg(0, signal.SIGKILL)  # the contest is over
    except Exception as error:
        _fail(pipe, error)


def _fail(pipe: Connection, error: Exception) -> None:
    traceback.print_exc()
    pipe.send(("error", repr(error)))


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes."""
    try:  # more exact than getrusage, which starts at the parent's memory
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _ask(pipe: Connection, entrant: Entrant, request: str) -> Any:
    try:
        if request != "result":
            pipe.send(request)
        kind, answer = pipe.recv()
    except GONE:
        kind, answer = "error", "its process ended; it may have run out of memory"
    if kind == "error":
        raise FewShotError(f"the benchmark's entrant {entrant.name!r} failed: {answer}")
    return answer


def _compare(contest: Contest, results: Sequence[NDArray[Any]]) -> None:
    ours = results[0]
    for entrant, theirs in zip(contest.entrants[1:], results[1:], strict=True):
        error = float(np.linalg.norm(np.subtract(theirs, ours, dtype=float)) / np.linalg.norm(ours))
        if not error <= contest.tolerance:
            raise FewShotError(
                f"{contest.title}: the results of {entrant.name!r} and {contest.entrants[0].name!r} differ by "
                f"{error:.2g} of the norm, more than {contest.tolerance:g}"
            )
