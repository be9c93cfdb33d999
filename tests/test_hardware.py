"""GPU work, on a fake device of PyTorch, and hardware options that may fail."""

import json
import os
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_bank
from fewshot import hardware
from fewshot.config import compose
from fewshot.data.episodes import EpisodeIndex, MetaBatch, Share
from fewshot.errors import FewShotError
from fewshot.hardware import check_hardware, has_bfloat16, precision_like, precision_of, report_out_of_memory
from fewshot.training import _memory_advice, make_data, make_method, train

BANK = make_bank({"train": [8] * 6, "val": [8] * 5, "test": [8] * 5}, size=28)
MAKE = [
    "way=3",
    "train.way=3",
    "train.query=4",
    "shot=2",
    "query=4",
    "train.meta_batch=2",
    "dataset=omniglot",
    "run_dir=unused",
]
METHODS = ["protonet", "matching", "matching_fce", "maml"]


class HostWatch(TorchDispatchMode):
    """Records every operation for which the host would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        devices = {value.device.type for value in (*args, result) if isinstance(value, torch.Tensor)}
        if "_local_scalar_dense" in name or "nonzero" in name or ("copy" in name and len(devices) > 1):
            self.waits.append(name)
        return result


@pytest.fixture
def data():
    module = make_data(compose(*MAKE))
    module._bank = BANK
    module.setup()
    return module


@pytest.mark.parametrize("room", [True, False])
def test_the_bank_is_on_the_gpu_if_it_fits_and_is_read_without_waiting(data, monkeypatch, room):
    free = 4 * BANK.images.nbytes + (1 if room else -1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    sent = []

    def send(tensor, device):
        sent.append(tensor.dtype)
        return tensor.to(device)

    monkeypatch.setattr("fewshot.data.images.send", send)  # memory cannot be pinned without a GPU
    gpu = torch.device("cuda", 0)
    positions = torch.arange(12).view(2, 6)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            images = data.images(positions, device=gpu)
        assert images.device == gpu and images.shape == (2, 6, 1, 28, 28)
    assert (data.images._resident[gpu] is not None) == room
    assert sent == [torch.int64 if room else torch.uint8] * 2
    # On the CPU, the images of the bank itself.
    torch.testing.assert_close(data.images(positions), data.images(positions, device=torch.device("cpu")))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_never_waits_for_a_number(method):
    model = make_method(compose(*MAKE, f"method={method}", *(["method.task_batching=vmap"] * (method == "maml"))))
    model.log_training = lambda *_: None  # it needs a trainer
    images = torch.rand(36, 1, 28, 28)
    positions = EpisodeIndex(
        support=torch.arange(12).view(2, 6),
        support_labels=torch.arange(3).repeat(2, 2),
        query=torch.arange(12, 36).view(2, 12),
        query_labels=torch.arange(3).repeat(2, 4),
        way=3,
    )
    meta_batch = MetaBatch(positions, Share([], 0.5), lambda positions, device: images[positions].to(device))
    with HostWatch() as watch:
        if method == "maml":
            model.meta_gradient(meta_batch.load())
        else:
            model.training_step(meta_batch, 0).backward()
    assert not watch.waits


CARD = {"accelerator": "gpu", "devices": 1, "precision": "32-true", "compile": False}
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL"
)


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, with the error of PyTorch and its CUDA version."""

    def pretend(message, cuda="12.8", processor="model name: Some Processor", mps=False):
        def init():
            raise RuntimeError(message)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(hardware, "_cpu_info", lambda key: dict([processor.split(": ")]).get(key, ""))

    return pretend


@pytest.fixture
def gpus(monkeypatch):
    """A machine with ``count`` GPUs of a compute capability."""

    def pretend(count=1, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some Card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability[0] >= 8)

    return pretend


@pytest.mark.parametrize(
    ("message", "cuda", "expected"),
    [
        ("Found no NVIDIA driver on your system. Please check that", "12.8", "no NVIDIA driver was found"),
        (TOO_OLD, "12.8", "the NVIDIA driver is too old: it is made for CUDA 11.4, and this PyTorch for CUDA 12.8"),
        ("No CUDA GPUs are available", "12.8", "CUDA_VISIBLE_DEVICES=7 hides the GPUs"),
        ("unknown error\nmore of it", "12.8", "unknown error."),
        ("", None, "is built for the CPU alone"),
    ],
)
@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_missing_gpu_is_reported_with_what_is_there(no_gpu, monkeypatch, message, cuda, expected, accelerator):
    no_gpu(message, cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(FewShotError) as refused:
        check_hardware({**CARD, "accelerator": accelerator})
    line = str(refused.value)
    assert line.startswith(f"hardware.accelerator={accelerator}: ") and expected in line
    assert "This machine has a CPU (Some Processor, " in line and line.endswith("choose hardware=cpu")
    assert "\n" not in line


@pytest.mark.parametrize("group", ["gpu", "ddp", "mps"])
def test_a_run_without_its_accelerator_stops_at_once(no_gpu, tmp_path, group):
    no_gpu("Found no NVIDIA driver on your system.")
    with pytest.raises(FewShotError, match="This machine has a CPU"):
        train(compose(f"hardware={group}", f"run_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"))
    assert not (tmp_path / "cache").exists() and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "hardware", ["accelerator=tpu", "accelerator=abacus", "devices=-1", "devices=0", "devices=[0,1]", "strategy=ddpp"]
)
def test_what_lightning_refuses_is_named(tmp_path, hardware):
    key, value = hardware.split("=")
    with pytest.raises(FewShotError, match=rf"^Lightning has no trainer with .*hardware\.{key}={re.escape(value)[:3]}"):
        train(compose("hardware=cpu", f"hardware.{hardware}", f"run_dir={tmp_path}", f"cache_dir={tmp_path}"))


def test_an_old_driver_is_reported_before_the_cpu_is_used(no_gpu, capsys):
    no_gpu(TOO_OLD)
    check_hardware({**CARD, "accelerator": "auto"})
    assert "the NVIDIA driver is too old" in capsys.readouterr().err
    no_gpu("Found no NVIDIA driver on your system.")
    check_hardware({**CARD, "accelerator": "auto"})
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "count", "instead"),
    [(2, 1, "1"), ("2", 1, "auto"), ([1], 1, "auto"), ("0,1", 1, "auto"), (5, 4, "4"), ([0, 7], 4, "auto")],
)
def test_too_many_gpus_are_rejected(gpus, devices, count, instead):
    gpus(count)
    with pytest.raises(FewShotError, match=rf"this machine has {count} GPUs? \(Some Card\); .*devices={instead}$"):
        check_hardware({**CARD, "devices": devices})


@pytest.mark.parametrize("devices", [1, "auto", -1, "-1", [0, 1], "0,1", 2])
def test_existing_gpus_are_accepted(gpus, devices):
    gpus(2)
    check_hardware({**CARD, "devices": devices})


@pytest.mark.parametrize(("cores", "devices", "most"), [(4, 5, 4), (4, "1000", 4), (1, 3, 2), (None, 3, 2)])
def test_more_processes_than_cores_are_rejected(monkeypatch, cores, devices, most):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    on_cpu = {**CARD, "accelerator": "cpu"}
    with pytest.raises(FewShotError, match=rf"devices={devices} starts .*devices={most} or fewer$"):
        check_hardware({**on_cpu, "devices": devices})
    for fine in (most, str(most), "auto"):
        check_hardware({**on_cpu, "devices": fine})


@pytest.mark.parametrize(("accelerator", "variable"), [("cpu", "CXX"), ("gpu", "CC")])
def test_compiling_without_a_compiler_is_rejected(gpus, monkeypatch, accelerator, variable):
    gpus()
    requested = {**CARD, "accelerator": accelerator, "compile": True}
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(FewShotError, match="no-such-compiler was not found; install one, name it with"):
        check_hardware(requested)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FewShotError, match=rf"(g\+\+|gcc) or clang(\+\+)? was not found.*{variable}=PATH"):
        check_hardware(requested)


def test_compiling_for_a_gpu_that_triton_does_not_support_is_rejected(gpus, monkeypatch):
    gpus(capability=(6, 1))
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name)
    monkeypatch.setattr(hardware, "find_spec", lambda _: None)
    with pytest.raises(FewShotError, match="needs the package triton"):
        check_hardware({**CARD, "compile": True})
    monkeypatch.setattr(hardware, "find_spec", lambda name: name)
    with pytest.raises(FewShotError, match=r"compute capability 7\.0, and 1 GPU \(Some Card\) has 6\.1"):
        check_hardware({**CARD, "compile": True})


def test_a_method_that_differentiates_twice_runs_uncompiled_and_reports_it(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    make_method(compose(*MAKE, "method=maml", "hardware.compile=true"))
    assert "differentiates its gradients" in capsys.readouterr().err and not compiled
    make_method(compose(*MAKE, "method=maml", "method.order=1", "hardware.compile=true"))
    assert not capsys.readouterr().out and len(compiled) == 1


@pytest.mark.parametrize(
    ("flags", "capability", "quick"),
    [
        ("avx2 avx512f avx512bw", None, False),
        ("avx512f avx512_bf16", None, True),
        ("amx_tile amx_bf16", None, True),
        ("", None, False),
        ("", (7, 5), False),
        ("", (8, 0), True),
    ],
)
def test_auto_uses_bfloat16_where_it_is_fast(no_gpu, gpus, capsys, flags, capability, quick):
    no_gpu("Found no NVIDIA driver on your system.", processor=f"flags: {flags}")
    if capability is not None:
        gpus(capability=capability)
    device = "cpu" if capability is None else "cuda"
    assert has_bfloat16(device) == quick
    requested = {**CARD, "accelerator": "auto"}
    assert precision_of({**requested, "precision": "auto"}) == ("bf16-mixed" if quick else "32-true")
    assert precision_of({**requested, "precision": "64-true"}) == "64-true"
    assert precision_like("bf16-mixed", requested) == ("bf16-mixed" if quick else "32-true")
    assert precision_like("16-mixed", requested) == ("16-mixed" if device == "cuda" else "32-true")
    assert precision_like("64-true", requested) == "64-true"
    check_hardware({**requested, "precision": "auto"})
    assert not capsys.readouterr().err
    check_hardware({**requested, "precision": "bf16-mixed"})  # forced
    assert ("has no bfloat16 arithmetic" in capsys.readouterr().err) != quick


def test_results_and_checkpoints_record_the_precision_that_auto_chose(no_gpu, tmp_path, cache_dir):
    no_gpu("Found no NVIDIA driver on your system.", processor="flags: avx2")
    tiny = ["train.episodes=2", "train.way=3", "val.episodes=2", "test.episodes=2", "encoder.filters=4"]
    train(compose(*tiny, "hardware.precision=auto", "pictures=false", f"run_dir={tmp_path}", f"cache_dir={cache_dir}"))
    assert json.loads((tmp_path / "results.json").read_text())["precision"] == "32-true"
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"]["hardware"]["precision"] == "32-true"


@pytest.mark.parametrize("name", ["protonet", "matching", "matching_fce", "maml"])
def test_the_small_budget_uses_bfloat16_only_where_it_is_fast(name):
    experiment = "maml_2nd" if name == "maml" else name if name == "protonet" else f"{name}_l2"
    config = compose(f"experiment=miniimagenet/{experiment}", "budget=cpu", "run_dir=unused")
    assert config.hardware.precision == "auto"


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "the GPU"),
        (RuntimeError("CUDA error: out of memory"), "the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "the GPU"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "this machine"),
        (MemoryError(), "this machine"),
    ],
)
@pytest.mark.parametrize("method", ["protonet", "maml"])
def test_out_of_memory_ends_in_one_line_that_says_what_to_lower(
    monkeypatch, tmp_path, cache_dir, error, device, method
):
    def fail(*_):
        raise error

    monkeypatch.setattr("fewshot.training.make_data", fail)
    config = compose(f"method={method}", f"run_dir={tmp_path}", f"cache_dir={cache_dir}")
    with pytest.raises(FewShotError) as refused:
        train(config)
    line = str(refused.value)
    assert line.startswith(f"the memory of {device} is full; lower ") and "\n" not in line
    assert ("method.vmap_tasks" in line) == (method == "maml") and f"resume={tmp_path}" in line


@pytest.mark.parametrize(
    ("choices", "helps"),
    [
        (("method=protonet", "train.meta_batch=4"), True),
        (("method=protonet", "train.meta_batch=1"), False),
        (("method=protonet", "train.meta_batch=4", "hardware.devices=4"), False),
        (("method=maml",), False),
    ],
)
def test_accumulation_is_advised_only_where_it_saves_memory(choices, helps):
    advice = _memory_advice(compose(*choices, "run_dir=run"))
    assert ("hardware.accumulate_grad_batches" in advice) == helps
    assert ("train.meta_batch" in advice) == ("train.meta_batch=4" in choices)


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), report_out_of_memory("lower it"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
