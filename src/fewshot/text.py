"""What others wrote, shown as text: names of classes, files and runs, overrides, messages of libraries.

Whatever leaves the program for a reader passes through here, by one function for each place that it goes to.
"""

import codecs
import html
import io
import os
import re
import sys
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

Value = TypeVar("Value")

LONGEST = 4000  # characters of a line
# Control characters, line ends, and what turns the direction of writing.
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# What a spreadsheet takes for a formula (the last four are what some of them read as the first four), or for the mark
# that says it is none.
FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]")
# Markdown's signs inside of a line. An underscore within a word is none, and stays readable.
SIGNS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/|(?<=www)\.", re.IGNORECASE)
# Of a heading, a list, or the line below a heading.
LEADING_SIGN = re.compile(r"^(?:(\d{1,9})(?=[.)](?:\s|$))|(?=[#+=-]))")
# How a terminal without a character shows it.
ASCII = {"±": "+/-", "×": "x", "−": "-", "–": "-", "…": "...", "•": "*", "“": '"', "”": '"', "’": "'"}


def for_terminal(text: str) -> str:
    """One line for a terminal: what is no printable character is shown as its escape, and what is too long is cut."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def for_markdown(text: str) -> str:
    """The same within a line of Markdown, or a cell of a table: no sign in it is one of Markdown or HTML."""
    signed = SIGNS.sub(r"\\\g<0>", for_terminal(text).strip())
    return html.escape(LEADING_SIGN.sub(r"\1\\", signed), quote=False)


def for_figure(text: str) -> str:
    """The same for a label or a title of a Matplotlib figure: no formula, and never left out of a legend."""
    shown = for_terminal(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def for_csv(value: Value) -> Value | str:
    """A cell of comma-separated values, which no spreadsheet takes for a formula.

    A text that could be one begins with an apostrophe more, which is how spreadsheets mark text. Control characters
    are shown as their escapes; all else stays, for programs that look for a file by its name. What is no text stays.
    """
    if not isinstance(value, str):
        return value
    text = STEERING.sub(lambda found: _escaped(found[0]), value)
    return f"'{text}" if FORMULA.match(text) else text


def for_html(text: str) -> str:
    """The text in a page, between tags or as a quoted attribute."""
    shown = STEERING.sub(lambda found: _escaped(found[0]), text)
    return html.escape("".join(_escaped(c) if "\ud800" <= c <= "\udfff" else c for c in shown))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def make_table(
    title: str, columns: Iterable[str], rows: Iterable[Sequence[object]], numbers: Container[str] = ()
) -> Table:
    """A table for the terminal, its cells text and nothing else.

    Args:
        title: above it.
        columns: their names.
        rows: a cell a column.
        numbers: the columns that stand to the right and are never broken; the others are, where they are too wide.
    """
    table = Table(title=Text(for_terminal(title)))
    for column in columns:
        header = Text(for_terminal(column))
        if column in numbers:
            table.add_column(header, justify="right", no_wrap=True)
        else:
            table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(for_terminal(str(cell))) for cell in row))
    return table


def say(*parts: str | Path | Table, error: bool = False) -> None:
    """Print lines and tables, each by itself.

    Args:
        parts: what to print; a text is one line.
        error: on the standard error.
    """
    for part in parts:
        if isinstance(part, Table):
            Console(stderr=error).print(part)
        else:
            print(for_terminal(str(part)), file=sys.stderr if error else sys.stdout, flush=True)


def open_streams() -> None:
    """Make the standard streams such that printing never ends a program: for the start of a process.

    What a terminal cannot encode is shown in ASCII, by its like or by its escape. When the standard output takes no
    more, as after ``| head -1``, where the terminal is closed or the disk is full, one line on the standard error says
    so, and the program goes on.
    """
    codecs.register_error("fewshot_ascii", _in_ascii)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, _opened(getattr(sys, name), number))


def _opened(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # it was closed before the program began
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    if not isinstance(stream, io.TextIOWrapper) or _number(stream) != number or isinstance(stream, _Stream):
        return stream  # somebody else's: a notebook's, or a test's
    stream.flush()
    buffer = io.BufferedWriter(_Unbroken(number, "wb", closefd=False))
    at_once = stream.line_buffering or stream.write_through
    return _Stream(buffer, stream.encoding, "fewshot_ascii", line_buffering=at_once)


def _number(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except OSError:
        return None


class _Stream(io.TextIOWrapper):
    """One of ours."""


class _Unbroken(io.FileIO):
    """A file that swallows what is written once it takes no more."""

    def write(self, content: Any) -> int:
        """Write, here or nowhere."""
        try:
            return super().write(content)
        except OSError as error:
            why = "nobody reads it any more" if isinstance(error, BrokenPipeError) else error.strerror
        # The number leads nowhere from now on, for the processes that are started later too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self.fileno() == 1:
            say(f"the standard output takes no more ({why}); the program goes on without it", error=True)
        return len(content)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = (ASCII.get(c) or _escaped(c) for c in error.object[error.start : error.end])
    return "".join(shown), error.end
