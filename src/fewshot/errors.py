"""The one error a user is meant to see."""

LONGEST = 4000  # characters of a line


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
        return "\n".join(printable(str(line)) for line in self.args)


def printable(text: str) -> str:
    """One line for a terminal: what is no printable character is shown as its escape, and what is too long is cut."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
