"""Processes forked with the package imported, because the import takes longer than a tiny run.

Each of them imports this module, which therefore imports no more than it needs.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["fewshot.training"])


def call(
    program: Path, arguments: Sequence[str], cwd: Path | str, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run ``python PROGRAM ARGUMENTS``.

    Returns:
        What ``subprocess.run`` returns with ``capture_output`` and ``text``.

    Raises:
        subprocess.TimeoutExpired: the program ran for longer than ``timeout`` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORKED.Process(target=_run, args=(program, list(arguments), cwd, dict(env), streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(program), *arguments], timeout)
        output, errors = (path.read_text() if path.exists() else "" for path in streams)
    return subprocess.CompletedProcess([str(program), *arguments], process.exitcode, output, errors)


def _run(program: Path, arguments: list[str], cwd: Path | str, env: dict[str, str], streams: Sequence[Path]) -> None:
    """Make this process what a new interpreter would be, and run the program in it."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    added = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(program.parent), *added, *installed]
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def start_training(*overrides: str) -> ForkServerProcess:
    """Start a process that trains; when interrupted, it writes the message to the run directory and exits."""
    process = FORKED.Process(target=_train, args=(overrides,))
    process.start()
    return process


def _train(overrides: tuple[str, ...]) -> None:
    from fewshot.config import compose  # noqa: PLC0415
    from fewshot.errors import Interrupted  # noqa: PLC0415
    from fewshot.training import train  # noqa: PLC0415

    config = compose(*overrides)
    try:
        train(config)
    except Interrupted as interrupted:
        Path(config.run_dir, "message").write_text(str(interrupted))
        raise SystemExit(interrupted.status) from None
