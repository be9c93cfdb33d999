"""The processes of a run, see ``hardware=ddp``: which one this is, and if one fails, the others end, too."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from subprocess import Popen
from typing import TYPE_CHECKING

from fewshot.errors import FewShotError

if TYPE_CHECKING:  # the command line imports this file
    import pytorch_lightning as pl

PATIENCE = 5.0  # seconds to wait for another process to end and for that to be noticed
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # Lightning's sources of the rank


def rank() -> int:
    """Return the rank of this process, from Lightning if it is imported."""
    lightning = sys.modules.get("lightning_fabric.utilities.rank_zero")
    if lightning is not None:
        return int(lightning.rank_zero_only.rank)
    return int(next((os.environ[name] for name in RANKS if os.environ.get(name)), 0))


@contextlib.contextmanager
def stop_together(trainer: "pl.Trainer", resume: str) -> Iterator[None]:
    """If the trainer fails inside the block, end the processes that it has started on this machine at once.

    torchrun and Slurm end those that they have started. The process group is always destroyed.

    Args:
        trainer: the trainer that has started the processes.
        resume: the command that resumes the run, for the message.

    Raises:
        FewShotError: the cause of the failure is that another process has ended.
    """
    import torch  # noqa: PLC0415

    parent = os.getppid()
    try:
        yield
    except BaseException as error:
        started: list[Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        children = started.copy()
        started.clear()  # Lightning watches these, and would kill this process, too
        ended = _ended(children, parent) if trainer.world_size > 1 and isinstance(error, RuntimeError) else None
        for child in children:
            child.kill()
        if ended is None:
            raise
        raise FewShotError(f"{ended}, and the run with it; resume with: {resume}") from error
    finally:
        # The threads of gloo abort a process that ends before them (PyTorch issue 190489); Lightning handles only NCCL.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _ended(children: list[Popen[bytes]], parent: int) -> str | None:
    """Describe the process that has ended, if any: to the others, its end is an error in a collective operation."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for number, child in enumerate(children, 1):
            if child.poll() is not None:
                return f"process {number} of {len(children) + 1} has ended with status {child.returncode}"
        if os.getppid() != parent:
            return "the first process has ended"
        time.sleep(0.1)
    return None
