"""Several processes that train as one, see ``hardware=ddp``: none of them outlives another that failed."""

import contextlib
import os
import time
from collections.abc import Iterator
from subprocess import Popen

import pytorch_lightning as pl
import torch

from fewshot.errors import FewShotError

PATIENCE = 5.0  # seconds that one process gives another to end, and to be seen to have


@contextlib.contextmanager
def stop_together(trainer: pl.Trainer, resume: str) -> Iterator[None]:
    """Around all that a trainer does: when it fails, the processes it has started on this machine end at once.

    Those that torchrun or Slurm has started are ended by them. The process group is left in any case.

    Args:
        trainer: whose processes are meant.
        resume: how to go on, for the message.

    Raises:
        FewShotError: what failed is that another process is gone.
    """
    parent = os.getppid()
    try:
        yield
    except BaseException as error:
        started: list[Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        children = started.copy()
        started.clear()  # Lightning watches these, and would kill this process too
        gone = _gone(children, parent) if trainer.world_size > 1 and isinstance(error, RuntimeError) else None
        for child in children:
            child.kill()
        if gone is None:
            raise
        raise FewShotError(f"{gone}, and the run with it; go on with: {resume}") from error
    finally:
        # The threads of gloo abort a process that ends before them (PyTorch issue 190489); Lightning sees to NCCL only.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _gone(children: list[Popen[bytes]], parent: int) -> str | None:
    """Which process ended, if one did: to the others that is an error in what they were doing together."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for number, child in enumerate(children, 1):
            if child.poll() is not None:
                return f"process {number} of {len(children) + 1} has ended with status {child.returncode}"
        if os.getppid() != parent:
            return "the first process has ended"
        time.sleep(0.1)
    return None
