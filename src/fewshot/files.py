"""Files in run directories: written atomically, and untrusted when read."""

import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from fewshot.errors import FewShotError
from fewshot.paths import ROOT

MAX_BYTES = 64 * 2**20  # of a JSON or YAML file


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically; create missing directories above it.

    Raises:
        FewShotError: it cannot be written; a previous file is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash could leave the new name without the content
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        fix = "free some space there, then resume a run with resume=RUN_DIR" if full else "name a path that is writable"
        raise FewShotError(f"cannot write {path}: {error.strerror}; what was saved before is kept: {fix}") from error


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """Open a text file that appears under its name once the block ends without an error, and not at all otherwise."""
    with (
        _partial(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="") as lines,
    ):
        yield lines


@contextmanager
def _partial(path: Path) -> Iterator[BinaryIO]:
    """Open a file next to the path; rename it to the path if the block succeeds, remove it otherwise."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with create(partial) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def output_directory(named: str | None, kind: str) -> Path:
    """Return the output directory of a command, created if missing: the one that the user names, or a new one.

    Args:
        named: a path; None: the directory of this job in a sweep (-m), and otherwise ``outputs/DATE/TIME_KIND``, with a
            number if that already exists.
        kind: the command, for the name of a new directory.
    """
    if named is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        named = HydraConfig.get().runtime.output_dir
    if named is not None:
        path = Path(named).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path
    now = datetime.now().astimezone()
    day = ROOT / "outputs" / f"{now:%Y-%m-%d}"
    day.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = day / (f"{now:%H-%M-%S}_{kind}" + (f"_{number}" if number > 1 else ""))
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError


def create(path: Path) -> BinaryIO:
    """Open a new file for writing; replace what a killed attempt left under its name.

    A link under that name is removed as well, so that its target stays unchanged.

    Raises:
        OSError: it cannot be created.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666), "wb")


def read_text(path: Path) -> str:
    """Read a text file in a run directory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, too large, or not text.
    """
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file in a run directory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or see ``read_text``.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_file(path: Path) -> None:
    """Reject files that could be read forever.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a regular file (a device or a pipe, for example).
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
