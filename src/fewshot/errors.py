"""What a user is meant to see of what went wrong."""


class FewShotError(Exception):
    """A mistake the user can mend: one line that names the thing at fault and what to do about it.

    The command line prints it without a traceback and exits with a non-zero status; see ``fewshot.cli``.
    """


def mistake(error: BaseException | None) -> FewShotError | None:
    """The user's mistake that an error of a library stems from, if it does."""
    while error is not None and not isinstance(error, FewShotError):
        error = error.__cause__
    return error


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
