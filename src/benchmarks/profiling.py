"""Profile of a training step, how long a GPU is busy in it, and what the processor and its memory could do."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Kinds of work, by substrings of the names of operations and their callers in PyTorch's profiler.
KINDS = {
    "convolution": ("conv",),
    "batch norm": ("batch_norm", "batchnorm"),
    "pooling": ("max_pool", "maxpool"),
    "ReLU": ("relu", "threshold"),
    "Adam": ("optimizer",),
    "distance and loss": ("mm", "softmax", "nll_loss", "nllloss", "linear"),
}
OTHER = "all else"
KINDS_AND_ELSE = (*KINDS, OTHER)


class Profile(NamedTuple):
    """Profile of one step.

    Attributes:
        seconds: median time.
        shares: share of the time by kind of work; they add up to 1.
        flops: floating-point operations of convolutions and matrix products; a multiply-add counts as two.
    """

    seconds: float
    shares: dict[str, float]
    flops: int


def profile_step(work: Callable[[], Any], rounds: int) -> Profile:
    """Time a step, count its floating-point operations, and attribute its time to kinds of work.

    Args:
        work: the step; it must run in this thread.
        rounds: how often it is timed.
    """
    work()
    flops, _ = count(work)
    seconds = _median(work, rounds)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    spent: Counter[str] = Counter()
    for event in profiler.events() or ():
        spent[_kind(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return Profile(seconds, {kind: spent[kind] / total for kind in KINDS_AND_ELSE}, flops)


class _Traffic(TorchDispatchMode):
    """Add up the sizes of what operations read and write."""

    size = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        if not operation.is_view and "empty" not in operation.name():
            used = [value for value in tree_leaves((args, kwargs, found)) if isinstance(value, torch.Tensor)]
            self.size += sum(tensor.numel() * tensor.element_size() for tensor in used)
        return found


def count(work: Callable[[], Any]) -> tuple[int, int]:
    """Count the floating-point operations of some work, and the bytes that its operations read and write.

    Args:
        work: it must run in this thread.

    Returns:
        The operations of convolutions and matrix products, a multiply-add counting as two; and the bytes of the inputs
        and outputs of all of PyTorch's operations, as if none stayed in the cache.
    """
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        work()
    return counter.get_total_flops(), traffic.size


def busy_seconds(work: Callable[[], Any]) -> float:
    """Do some work under the profiler, and return for how long a GPU computed or copied, in any thread or stream.

    The profiler slows the host, but not the GPU: compare the result with the time that the work takes without it.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return union((event.time_range.start, event.time_range.end) for event in events) / 1e6


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of some intervals, each a start and an end."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def _kind(event: Any) -> str:
    """Return the kind of the innermost caller with a known name."""
    while event is not None:
        name = event.name.lower()
        for kind, parts in KINDS.items():
            if any(part in name for part in parts):
                return kind
        event = event.cpu_parent
    return OTHER


def convolution_peak(rounds: int) -> float:
    """Measure the peak floating-point operations per second of a 3x3 convolution with 64 filters on this processor.

    Args:
        rounds: how often each of several image sizes is timed; the best median counts.
    """
    weight = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
    best = 0.0
    for size in (14, 28, 42, 56):
        images = torch.randn(64, 64, size, size).to(memory_format=torch.channels_last)

        def convolve(images: torch.Tensor = images) -> None:
            with torch.no_grad():
                torch.conv2d(images, weight, padding=1)

        convolve()
        best = max(best, 2 * images.numel() * weight[0].numel() / _median(convolve, rounds))
    return best


def memory_peak(rounds: int) -> float:
    """Measure how many bytes per second this processor copies in memory, read and written bytes added up."""
    source = torch.ones(2**24)
    target = torch.ones(2**24)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), rounds)


def _median(work: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
