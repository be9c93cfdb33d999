"""Errors that users see."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from textwrap import shorten

from fewshot.text import for_terminal


class FewShotError(Exception):
    """A mistake that the user can fix: one line that names the cause and what to do about it.

    The command line prints it without a traceback and exits with a non-zero status; see ``fewshot.cli``.

    Args:
        lines: the message; each argument is a line, and most messages have one. Untrusted text in a line can
            neither break it nor control the terminal.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(for_terminal(str(line)) for line in self.args)


def shortened(items: Sequence[str], most: int = 5) -> str:
    """Shorten a list for a message: the first few items, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``(did you mean ...?)`` with the most similar of the names, for a message; empty if none is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def mistake(error: BaseException | None) -> FewShotError | None:
    """Return the user's mistake that caused a library's error, if there is one."""
    return next((cause for cause in causes(error) if isinstance(cause, FewShotError)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it followed from; the last is the first that was raised."""
    while error is not None:
        yield error
        error = error.__cause__


def reason(error: BaseException) -> str:
    """Return a library's error in one line; for weights that do not fit, the first of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    is_about_weights = lines[0].startswith("Error(s) in loading state_dict") and len(lines) > 1
    return shorten(lines[1] if is_about_weights else lines[0], 200)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run: one line that says how to resume it.

    Args:
        number: the signal.
        resume: the command that resumes the run.

    Attributes:
        status: the exit status of the process.
    """

    def __init__(self, number: int, resume: str) -> None:
        super().__init__(f"interrupted; resume with: {resume}")
        self.status = 128 + number
