"""Files in the directory of a run: written whole or not at all, and read whoever made them."""

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

from fewshot.config import ROOT
from fewshot.errors import FewShotError

MOST_BYTES = 64 * 2**20  # of a JSON or YAML file


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, or not at all; the directories above it are made.

    Raises:
        FewShotError: it cannot be written; what was there before is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a machine that dies could keep the new name and none of the content
    except OSError as error:
        raise FewShotError(
            f"cannot write {path}: {error.strerror}; what was saved before is kept: make room there, then go on with "
            f"the run by resume=RUN_DIR"
        ) from error


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file to write to, line by line, which takes its name once all is written and leaves nothing otherwise."""
    with (
        _partial(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="") as lines,
    ):
        yield lines


@contextmanager
def _partial(path: Path) -> Iterator[BinaryIO]:
    """A file beside the path, which takes its name once the block of code has ended well, and is removed otherwise."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with create(partial) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def output_directory(named: str | None, kind: str) -> Path:
    """The directory that a command writes to, made if need be: the one that the user names, or else a new one.

    Args:
        named: a path; None: ``outputs/DATE/TIME_KIND``, with a number where another command has made that already.
        kind: of command, for the name of a new one.
    """
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
    """Open a new file to write to; what an attempt that was killed left under its name is removed.

    A link under that name is removed as well, so that what it points to stays as it is.

    Raises:
        OSError: it cannot be created.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666), "wb")


def read_text(path: Path) -> str:
    """The text of a file in the directory of a run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device or the like, is too large, or no text.
    """
    check_file(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of such a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or see ``read_text``.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_file(path: Path) -> None:
    """Refuse what could be read without end.

    Raises:
        OSError: there is no such file.
        ValueError: it is a device, a pipe or the like.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
