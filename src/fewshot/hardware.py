"""The machine, and process settings that make training faster without changing results."""

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
NO_DRIVER = "no NVIDIA driver"  # the wording of PyTorch
OLDEST_COMPILED = 7  # Triton's minimum compute capability


def keep_freed_memory() -> None:
    """Make the allocator keep the memory that a training step frees, for the next step to use.

    By default glibc returns blocks of the size of activations to the system at once, and each step pays again for
    mapping and zeroing their pages: over a third of a step of Conv4 on the CPU. In exchange, the memory of the process
    never shrinks below its peak. Does nothing if the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never: the largest threshold, 2 GiB, is less than a step at 84x84 frees
        mallopt(M_TOP_PAD, 2**24)


def machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Describe what a speed was measured on: ``processor``, ``threads`` in use, and ``accelerator`` if it is a GPU.

    Args:
        device: the device that does the work.
        processes: the number of processes; each has that many threads and its own accelerator.
    """
    record: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if processes > 1:
        record["processes"] = processes
    return record | {"accelerator": torch.cuda.get_device_name(device)} if device.type == "cuda" else record


def describe(record: Mapping[str, Any]) -> str:
    """Return what ``machine`` recorded, in words: the accelerator or else the processor, processes and threads."""
    words = [str(record.get("accelerator") or record.get("processor") or "CPU")]
    for count, word, ending in ((record.get("processes"), "process", "es"), (record.get("threads"), "thread", "s")):
        words += [f"{count} {word}{ending if count != 1 else ''}"] if count else []
    return ", ".join(words)


def asynchronous(device: torch.device) -> bool:
    """Whether the host continues while the device computes, so that reading a number means waiting for it."""
    return device.type != "cpu"


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor to a device; the host does not wait for a copy to a GPU."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_hardware(hardware: Mapping[str, Any]) -> None:
    """Reject settings that this machine does not support, and warn about slow ones.

    Args:
        hardware: the configuration group ``hardware``.

    Raises:
        FewShotError: the accelerator or a compiler is missing, or there are too few devices.
    """
    accelerator, found = hardware["accelerator"], device_type(hardware)
    if accelerator in {"gpu", "cuda"} and found == "cpu":
        raise FewShotError(
            f"hardware.accelerator={accelerator}: {why_no_gpu()}. This machine has {_cpu()}; choose hardware=cpu"
        )
    if accelerator == "mps" and found == "cpu":
        raise FewShotError(
            f"hardware.accelerator=mps: there is no Apple silicon, or no PyTorch for it. This machine has {_cpu()}; "
            "choose hardware=cpu or hardware=auto"
        )
    if accelerator == "auto" and found == "cpu" and "driver" in (why := why_no_gpu()) and NO_DRIVER not in why:
        _warn(f"hardware.accelerator=auto: {why}. Using the CPU")
    if found == "cuda":
        _check_devices(hardware.get("devices", 1))
    if found == "cpu":
        _check_processes(str(hardware.get("devices", 1)).strip())
    if hardware.get("compile"):
        _check_compiler(found)
    precision = str(hardware.get("precision"))
    if precision.startswith("bf16") and not has_bfloat16(found):
        name = _processor() if found == "cpu" else _gpus(range(1))
        _warn(
            f"hardware.precision={precision}: {name} has no bfloat16 arithmetic and emulates it, many times slower "
            "than float32; hardware.precision=auto uses bfloat16 only where it is fast"
        )


def device_type(hardware: Mapping[str, Any]) -> str:
    """Return the device type that the configuration group ``hardware`` selects here: "cuda", "mps" or "cpu"."""
    accelerator = hardware["accelerator"]
    # ``check_hardware`` reports driver problems in one line.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    if accelerator in {"auto", "gpu", "mps"} and torch.backends.mps.is_available():
        return "mps"
    return "cuda" if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available() else "cpu"


def precision_of(hardware: Mapping[str, Any]) -> str:
    """Return the configured precision; for "auto", bfloat16 where the hardware is fast at it."""
    if hardware["precision"] != "auto":
        return str(hardware["precision"])
    return "bf16-mixed" if has_bfloat16(device_type(hardware)) else "32-true"


def precision_like(trained: str, hardware: Mapping[str, Any]) -> str:
    """Return the precision of a training, or "32-true" where this machine could only emulate it.

    Args:
        trained: the precision of a run, perhaps on another machine.
        hardware: the configuration group ``hardware`` of this command.
    """
    device = device_type(hardware)
    if trained.startswith("bf16"):
        return trained if has_bfloat16(device) else "32-true"
    return "32-true" if trained.startswith("16") and device == "cpu" else trained


def has_bfloat16(device: str) -> bool:
    """Whether a device type, see ``device_type``, computes faster in bfloat16 than in float32.

    Processors with AVX-512 BF16 or AMX do; on others, PyTorch emulates it.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_info("flags").split())


@contextlib.contextmanager
def report_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn running out of memory into one clear line.

    Args:
        remedy: what to lower, for the message.

    Raises:
        FewShotError: names the device, its memory and the remedy.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA.*out of memory|CUBLAS.*ALLOC", str(error))
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        device = "this machine"
        if on_gpu and torch.cuda.is_available():
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            device = f"the GPU ({torch.cuda.get_device_name()}, {size / 2**30:.0f} GiB)"
        elif on_gpu:
            device = "the GPU"
        raise FewShotError(f"the memory of {device} is full; {remedy}") from error


@rank_zero_only
def _warn(line: str) -> None:
    say(f"warning: {line}", error=True)


def why_no_gpu() -> str:
    """Return why PyTorch finds no GPU."""
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
        requested = [int(number) for number in devices.split(",") if number.strip().isdecimal()]
    elif isinstance(devices, int | str):
        requested = list(range(int(text))) if text.isdecimal() else []  # "auto" and -1 mean all
    else:
        requested = list(devices)
    if any(number >= count for number in requested):
        raise FewShotError(
            f"hardware.devices={text}: this machine has {_gpus(range(count))}; choose hardware.devices="
            f"{count if isinstance(devices, int) else 'auto'}"
        )


def _check_processes(devices: str) -> None:
    most = max(os.cpu_count() or 1, 2)  # two show anywhere how processes share the work
    if devices.isdecimal() and int(devices) > most:
        raise FewShotError(
            f"hardware.devices={devices} starts as many processes, and this machine has {_cpu()}; choose "
            f"hardware.devices={most} or fewer"
        )


def _check_compiler(device: str) -> None:
    """Check what ``torch.compile`` needs: Triton and a C compiler for a GPU, a C++ compiler for the CPU."""
    language, key, usual = ("C", "CC", ("gcc", "clang")) if device == "cuda" else ("C++", "CXX", ("g++", "clang++"))
    configured = os.environ.get(key)
    names = usual if configured is None else (configured,)
    if not any(map(shutil.which, names)):
        raise FewShotError(
            f"hardware.compile=true needs a {language} compiler, and {' or '.join(names)} was not found; install one, "
            f"name it with {key}=PATH, or choose hardware.compile=false"
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
    """Return an entry of the first core in /proc/cpuinfo; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Apply ``function`` to every item in parallel, one thread per item, with as many threads as PyTorch uses.

    Small operations gain little from being split over threads. The results have the order of the items, so a sum over
    them does not depend on which thread is faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the whole process, since a backward pass uses that number in every thread
    try:
        yield from _pool(threads).map(function, items)
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fewshot")
