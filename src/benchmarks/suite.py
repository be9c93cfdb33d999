"""All contests, by name, for the CPU and for a GPU."""

from collections.abc import Sequence

import torch

from benchmarks import maml, reading, training, without
from benchmarks.contest import Contest
from fewshot.errors import FewShotError
from fewshot.hardware import why_no_gpu

DEVICES = ("cpu", "cuda")


def choose(only: Sequence[str] | None, device: str = "cpu") -> dict[str, Contest]:
    """Select the contests to run.

    Args:
        only: names of contests, or prefixes of them; None: all.
        device: "cpu" or "cuda"; a GPU has fewer contests.

    Raises:
        FewShotError: a name is unknown, or there is no such device.
    """
    if device not in DEVICES:
        raise FewShotError(f"device={device} must be {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise FewShotError(f"device=cuda: {why_no_gpu()}; choose device=cpu")
    if device == "cpu":
        known = training.contests() | maml.contests() | without.contests() | reading.contests()
    else:
        known = maml.device_contests(device) | training.device_contests(device)
    if only is None:
        return known
    for name in only:
        if not any(contest.startswith(name) for contest in known):
            raise FewShotError(f"only={name} is not a benchmark: choose from {', '.join(known)}")
    return {name: contest for name, contest in known.items() if name.startswith(tuple(only))}
