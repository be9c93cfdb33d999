"""The one error a user is meant to see."""


class FewShotError(Exception):
    """A mistake the user can mend: one line that names the thing at fault and what to do about it.

    The command line prints it without a traceback and exits with a non-zero status; see ``fewshot.cli``.
    """
