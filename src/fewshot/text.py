"""Escaping of untrusted text: names of classes, files and runs, overrides, messages of libraries.

All output for people passes through here; there is one function per kind of output.
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

MAX_CHARACTERS = 4000  # characters of a line
# Control characters, line ends, and characters that change the writing direction.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# The start of a formula in a spreadsheet (some also accept full-width signs), or an apostrophe, which marks text.
FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]")
# Markdown's special characters within a line. An underscore within a word is not one, and stays readable.
MARKDOWN_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/|(?<=www)\.", re.IGNORECASE)
# Markdown that starts a heading or a list, or underlines a heading.
LEADING_SIGN = re.compile(r"^(?:(\d{1,9})(?=[.)](?:\s|$))|(?=[#+=-]))")
# Replacements for terminals that cannot show a character.
ASCII = {"±": "+/-", "×": "x", "−": "-", "–": "-", "…": "...", "•": "*", "“": '"', "”": '"', "’": "'"}


def for_terminal(text: str) -> str:
    """Make one line for a terminal: unprintable characters are escaped, and a long text is cut."""
    if len(text) > MAX_CHARACTERS:
        text = f"{text[: MAX_CHARACTERS // 2]} ... {text[-MAX_CHARACTERS // 2 :]}"
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def cut(text: str, width: int) -> str:
    """Cut a string in the middle, since names often differ at their end as well as at their beginning."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end].rstrip()}…{text[len(text) - end :].lstrip()}"


def for_markdown(text: str) -> str:
    """Escape text within a line or a table cell of Markdown, where it is neither Markdown nor HTML."""
    signed = MARKDOWN_SPECIAL.sub(r"\\\g<0>", for_terminal(text).strip())
    return html.escape(LEADING_SIGN.sub(r"\1\\", signed), quote=False)


def for_figure(text: str) -> str:
    """Escape a label or title of a Matplotlib figure, so that it is not read as a formula or left out of a legend."""
    shown = for_terminal(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def for_csv(value: Value) -> Value | str:
    """Escape a cell of comma-separated values, so that no spreadsheet reads it as a formula.

    Strings that could be formulas get a leading apostrophe, which is how spreadsheets mark text. Control characters are
    escaped; everything else is unchanged, so that programs can find files by these names. Other values are unchanged.
    """
    if not isinstance(value, str):
        return value
    text = CONTROL.sub(lambda match: _escaped(match[0]), value)
    return f"'{text}" if FORMULA.match(text) else text


def for_html(text: str) -> str:
    """Escape text in a page, between tags or as a quoted attribute."""
    shown = CONTROL.sub(lambda match: _escaped(match[0]), text)
    return html.escape("".join(_escaped(c) if "\ud800" <= c <= "\udfff" else c for c in shown))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def make_table(
    title: str, columns: Iterable[str], rows: Iterable[Sequence[object]], numbers: Container[str] = ()
) -> Table:
    """Make a table for the terminal; its cells are plain text, without markup.

    Args:
        title: the title above the table.
        columns: the names of the columns.
        rows: one cell per column.
        numbers: columns that are right-aligned and never wrapped; the others are wrapped if too wide.
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
    """Print lines and tables.

    Args:
        parts: what to print; a string is one line.
        error: print to the standard error.
    """
    for part in parts:
        if isinstance(part, Table):
            Console(stderr=error).print(part)
        else:
            print(for_terminal(str(part)), file=sys.stderr if error else sys.stdout, flush=True)


def open_streams() -> None:
    """Set up the standard streams at the start of a process, so that printing never ends the program.

    Characters that a terminal cannot encode are shown as similar ASCII or as an escape. If the standard output cannot
    be written any more (after ``| head -1``, or because the terminal is closed or the disk is full), one line on the
    standard error says so, and the program continues.
    """
    codecs.register_error("fewshot_ascii", _in_ascii)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, _opened(getattr(sys, name), number))


def _opened(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # it was closed before the program began
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    if not isinstance(stream, io.TextIOWrapper) or _number(stream) != number or isinstance(stream, _Stream):
        return stream  # replaced by a notebook or a test
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
    """A stream that ``open_streams`` has set up."""


class _Unbroken(io.FileIO):
    """A file that discards what is written once writing fails."""

    def write(self, content: Any) -> int:
        """Write, or discard the content if that fails."""
        try:
            return super().write(content)
        except OSError as error:
            why = "its reader is gone" if isinstance(error, BrokenPipeError) else error.strerror
        # Redirect the descriptor, for processes that are started later, too.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.fileno())
        os.close(devnull)
        if self.fileno() == 1:
            say(f"cannot write to the standard output ({why}); the program continues without it", error=True)
        return len(content)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = (ASCII.get(c) or _escaped(c) for c in error.object[error.start : error.end])
    return "".join(shown), error.end
