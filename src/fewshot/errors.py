"""What a user is meant to see of what went wrong."""

from collections.abc import Sequence
from textwrap import shorten

from fewshot.text import for_terminal


class FewShotError(Exception):
    """A mistake the user can mend: one line that names the thing at fault and what to do about it.

    The command line prints it without a traceback and exits with a non-zero status; see ``fewshot.cli``.

    Args:
        lines: the message; each argument is a line, and most messages have one. What a line may quote from a file can
            neither break it nor steer the terminal.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(for_terminal(str(line)) for line in self.args)


def shortened(items: Sequence[str], most: int = 5) -> str:
    """A list for a message: the first few items, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def mistake(error: BaseException | None) -> FewShotError | None:
    """The user's mistake that an error of a library stems from, if it does."""
    while error is not None and not isinstance(error, FewShotError):
        error = error.__cause__
    return error


def reason(error: Exception) -> str:
    """What a library's error says, in a line; of one about weights that do not fit, the first that does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    of_weights = lines[0].startswith("Error(s) in loading state_dict") and len(lines) > 1
    return shorten(lines[1] if of_weights else lines[0], 200)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run: one line on how to go on.

    Args:
        number: of the signal.
        resume: the command that goes on.

    Attributes:
        status: what the process exits with.
    """

    def __init__(self, number: int, resume: str) -> None:
        super().__init__(f"interrupted; go on with: {resume}")
        self.status = 128 + number
