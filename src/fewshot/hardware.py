"""What this machine is, and settings of the process that make training faster and change no result."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from platform import processor
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only

from fewshot.errors import FewShotError, reason
from fewshot.text import say

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NO_DRIVER = "no NVIDIA driver"  # as PyTorch says it, too
OLDEST_COMPILED = 7  # the compute capability that Triton starts from


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


def asynchronous(device: torch.device) -> bool:
    """Whether the host goes on while the device computes, so that to look at a number is to wait for it."""
    return device.type != "cpu"


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor to a device. On its way from the host to a GPU, the host does not wait for it to arrive."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_hardware(hardware: Mapping[str, Any]) -> None:
    """Refuse what this machine cannot do, and warn of what it does slowly.

    Args:
        hardware: the configuration group of that name.

    Raises:
        FewShotError: there is no such accelerator, there are not as many, or there is no compiler.
    """
    accelerator, found = hardware["accelerator"], device_type(hardware)
    if accelerator in {"gpu", "cuda"} and found == "cpu":
        raise FewShotError(
            f"hardware.accelerator={accelerator}: {_why_no_gpu()}. What is there: {_cpu()}; choose hardware=cpu"
        )
    if accelerator == "mps" and found == "cpu":
        raise FewShotError(
            f"hardware.accelerator=mps: there is no Apple silicon, or no PyTorch for it. What is there: {_cpu()}; "
            "choose hardware=cpu or hardware=auto"
        )
    if accelerator == "auto" and found == "cpu" and "driver" in (why := _why_no_gpu()) and NO_DRIVER not in why:
        _warn(f"hardware.accelerator=auto: {why}. So this runs on the CPU")
    if found == "cuda":
        _check_devices(hardware.get("devices", 1))
    if hardware.get("compile"):
        _check_compiler(found)
    precision = str(hardware.get("precision"))
    if precision.startswith("bf16") and not has_bfloat16(found):
        name = _processor() if found == "cpu" else _gpus(range(1))
        _warn(
            f"hardware.precision={precision}: {name} has no bfloat16 arithmetic and emulates it, many times slower "
            "than float32; hardware.precision=auto takes bfloat16 where it is quick"
        )


def device_type(hardware: Mapping[str, Any]) -> str:
    """What the configuration group ``hardware`` leads to on this machine: "cuda", "mps" or "cpu"."""
    accelerator = hardware["accelerator"]
    # What PyTorch has to say of a driver is said in one line, by ``check_hardware``.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    if accelerator in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        return "mps"
    return "cuda" if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available() else "cpu"


def precision_of(hardware: Mapping[str, Any]) -> str:
    """The precision to compute in: what is configured; for "auto", bfloat16 where there is quick arithmetic for it."""
    if hardware["precision"] != "auto":
        return str(hardware["precision"])
    return "bf16-mixed" if has_bfloat16(device_type(hardware)) else "32-true"


def has_bfloat16(device: str) -> bool:
    """Whether devices of a type, see ``device_type``, compute in bfloat16 more quickly than in float32.

    Of processors those with AVX-512 BF16 or AMX do; on others, PyTorch emulates it.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_info("flags").split())


@contextlib.contextmanager
def report_out_of_memory(remedy: str) -> Iterator[None]:
    """Around what may need more memory than there is.

    Args:
        remedy: what to lower, for the message.

    Raises:
        FewShotError: names the device, how much memory it has, and the remedy.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA.*out of memory|CUBLAS.*ALLOC", str(error))
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        place = "this machine"
        if on_gpu and torch.cuda.is_available():
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            place = f"the GPU ({torch.cuda.get_device_name()}, {size / 2**30:.0f} GiB)"
        elif on_gpu:
            place = "the GPU"
        raise FewShotError(f"the memory of {place} is full; {remedy}") from error


@rank_zero_only
def _warn(line: str) -> None:
    say(f"warning: {line}", error=True)


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) is built for the CPU alone; see pytorch.org for one with CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        message = str(error)
        too_old = re.search(r"driver.*too old \(found version (\d+)\)", message)
        if too_old:
            major, minor = int(too_old[1]) // 1000, int(too_old[1]) % 1000 // 10
            return (
                f"the NVIDIA driver is too old: it is made for CUDA {major}.{minor}, and this PyTorch for CUDA "
                f"{torch.version.cuda}; update the driver, or install a PyTorch for CUDA {major}.{minor}"
            )
        if NO_DRIVER in message:
            return f"{NO_DRIVER} was found, so there is no NVIDIA GPU, or its driver is not installed"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if "No CUDA GPUs" in message and hidden is not None:
            return f"CUDA_VISIBLE_DEVICES={hidden} hides the GPUs"
        return reason(error)
    return "PyTorch finds no GPU"


def _check_devices(devices: int | str | Sequence[int]) -> None:
    count = torch.cuda.device_count()
    text = str(devices).strip()
    if isinstance(devices, str) and "," in devices:
        asked = [int(number) for number in devices.split(",") if number.strip().isdecimal()]
    elif isinstance(devices, int | str):
        asked = list(range(int(text))) if text.isdecimal() else []  # "auto" and -1: all there are
    else:
        asked = list(devices)
    if any(number >= count for number in asked):
        raise FewShotError(
            f"hardware.devices={text}: this machine has {_gpus(range(count))}; choose hardware.devices="
            f"{count if isinstance(devices, int) else 'auto'}"
        )


def _check_compiler(device: str) -> None:
    """What ``torch.compile`` calls: Triton and a C compiler for a GPU, a C++ compiler for the CPU."""
    needed, named, usual = ("C", "CC", ("gcc", "clang")) if device == "cuda" else ("C++", "CXX", ("g++", "clang++"))
    given = os.environ.get(named)
    names = usual if given is None else (given,)
    if not any(map(shutil.which, names)):
        raise FewShotError(
            f"hardware.compile=true needs a {needed} compiler, and {' or '.join(names)} was not found; install one, "
            f"name it by {named}=PATH, or choose hardware.compile=false"
        )
    if device == "cuda" and find_spec("triton") is None:
        raise FewShotError(
            "hardware.compile=true needs the package triton on a GPU, and it is not installed; install it, or choose "
            "hardware.compile=false"
        )
    if device == "cuda" and (generation := torch.cuda.get_device_capability())[0] < OLDEST_COMPILED:
        raise FewShotError(
            f"hardware.compile=true needs a GPU of compute capability {OLDEST_COMPILED}.0, and {_gpus(range(1))} has "
            f"{generation[0]}.{generation[1]}; choose hardware.compile=false"
        )


def _gpus(numbers: Iterable[int]) -> str:
    names = [torch.cuda.get_device_name(number) for number in numbers]
    return f"{len(names)} GPU{'s' * (len(names) > 1)} ({', '.join(dict.fromkeys(names))})"


def _cpu() -> str:
    return f"a CPU ({_processor()}, {os.cpu_count()} cores)"


def _processor() -> str:
    return _cpu_info("model name") or processor()


def _cpu_info(key: str) -> str:
    """What Linux tells of the first core; an empty text elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


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
