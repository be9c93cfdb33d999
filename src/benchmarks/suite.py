"""All contests, by name."""

from collections.abc import Sequence

from benchmarks import maml, training
from benchmarks.contest import Contest
from fewshot.errors import FewShotError


def choose(only: Sequence[str] | None) -> dict[str, Contest]:
    """Select the contests to run.

    Args:
        only: names of contests, or prefixes of them; None: all.

    Raises:
        FewShotError: a name is unknown.
    """
    known = {**training.contests(), **maml.contests()}
    if only is None:
        return known
    for name in only:
        if not any(contest.startswith(name) for contest in known):
            raise FewShotError(f"only={name} is not a benchmark: choose from {', '.join(known)}")
    return {name: contest for name, contest in known.items() if name.startswith(tuple(only))}
