"""What this machine is, and settings of the process that make training faster and change no result."""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from platform import processor
from typing import Any

import torch

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let the allocator keep the memory that a training step frees, for the next step to use.

    By default glibc gives blocks the size of activations back to the system at once, and each step pays again for
    having every page of them mapped and zeroed: over a third of a step of Conv4 on the CPU. The price is that the
    process never shrinks below its peak. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never: the largest threshold, 2 GiB, is less than a step at 84x84 frees
        mallopt(M_TOP_PAD, 2**28)


def machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a speed was measured on: the ``processor``, its ``threads`` in use, and the ``accelerator`` if it is a GPU.

    Args:
        device: that does the work.
        processes: that share it, if there are several; each has that many threads, and an accelerator of its own.
    """
    found: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if processes > 1:
        found["processes"] = processes
    return found | {"accelerator": torch.cuda.get_device_name(device)} if device.type == "cuda" else found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor())


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Apply ``function`` to every item, each on one thread of its own, as many at a time as PyTorch uses threads.

    Many small operations gain little from being spread over threads one by one. The results come in the order of the
    items, so what is summed over them does not depend on which thread was quicker.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the whole process: a backward pass takes that number, whichever thread it runs in
    try:
        yield from _pool(threads).map(function, items)
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fewshot")
