"""The GPU suite: everything that must hold on a GPU; the same tests run on the CPU, tiny, if there is none.

``python -m pytest tests/gpu --confcutdir=tests/gpu`` is meant to take under four minutes on one GPU. It needs no
network, and only pytest and the project's own dependencies: ``--confcutdir`` leaves out tests/conftest.py, which needs
more.
"""

import gc
import json
import multiprocessing
import os
import re
import signal
import socket
import traceback
from contextlib import nullcontext

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities import rank_zero_only
from torch.utils._python_dispatch import TorchDispatchMode

from fewshot.callbacks import FiniteGradients, Record
from fewshot.config import ROOT, compose, trains_on, with_classes
from fewshot.dashboard import Dashboard
from fewshot.data.classes import ClassBatch
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import Episode, Share
from fewshot.data.images import ImageTable
from fewshot.errors import FewShotError, Interrupted
from fewshot.evaluation import evaluate
from fewshot.methods.base import MetricMethod
from fewshot.methods.classifier import Baseline
from fewshot.methods.maml import MAML
from fewshot.predictor import make_predictor
from fewshot.training import make_data, make_method, make_trainer, train

GPUS = torch.cuda.device_count()
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.skipif(GPUS == 0, reason="PyTorch finds no GPU")),
    pytest.param("cpu", marks=pytest.mark.skipif(GPUS > 0, reason="the same runs on the GPU")),
]
METHODS = {
    "protonet": ["method=protonet", "train.way=8"],
    "matching": ["method=matching", "distance=scaled_cosine", "distance.learn=true"],
    "matching_fce": ["method=matching_fce"],
    "maml": ["method=maml", "train.meta_batch=4", "method.task_batching=vmap", "method.inner_learning_rate=0.1"],
    "maml_1st": [
        "method=maml",
        "method.order=1",
        "train.meta_batch=4",
        "method.inner_learning_rate=0.1",
        "method.clip_norm=1",
    ],
    "classifier": ["method=classifier", "train.batch_size=16"],
    "classifier_cosine": ["method=classifier", "method.head=cosine", "train.batch_size=16"],
    "nca": ["method=nca", "train.batch_size=16"],
    "r2d2": ["method=r2d2"],
    "metaoptnet_ridge": ["method=metaoptnet_ridge", "method.penalty=1"],  # 50 is much for four features
    "relation": ["method=relation", "method.filters=8"],
    "feat": ["method=feat", "method.dropout=0"],
    "meta_baseline": ["method=meta_baseline"],
}
SIZES = {
    "cuda": {"filters": 64, "episodes": 48, "tested": 200, "compared": 1000, "steps": 300},
    "cpu": {"filters": 4, "episodes": 8, "tested": 4, "compared": 20, "steps": 12},
}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Turn TF32 off, whose significand has ten bits, and undo what a test turns on."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("banks")


@pytest.fixture
def make_config(device, cache, tmp_path):
    """Composes the configuration of a small run on the device."""

    def configure(*overrides, name="run", on=device):
        size = SIZES[device]
        return compose(
            *(f"hardware={group_of(on)}", f"encoder.filters={size['filters']}"),
            *("query=3", "train.query=3", f"train.episodes={size['episodes']}", f"val.every={size['episodes'] // 2}"),
            *("val.episodes=4", f"test.episodes={size['tested']}", f"checkpoint_every={size['episodes'] // 4}"),
            *("pictures=false", f"run_dir={tmp_path / name}", f"cache_dir={cache}"),
            *overrides,
        )

    return configure


def noise(count, way, seed):
    """A meta-batch without equal pixels: among equal ones, rounding decides which one max pooling takes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(way).expand(count, way)
    support, query = (torch.randn(count, way * shot, 28, 28, 1, generator=generator).movedim(-1, -3) for shot in (1, 3))
    return Episode(support, labels, query, labels.repeat_interleave(3, 1), way)


def relative_error(actual, expected):
    """The norm of the difference of two lists of tensors, relative to the norm of the second."""
    first, second = (
        torch.cat([t.detach().double().cpu().flatten() for t in tensors]) for tensors in (actual, expected)
    )
    return float((first - second).norm() / second.norm())


def make_both(config):
    """Make the method and its data."""
    data = make_data(config)
    return make_method(with_classes(config, len(data.bank.classes("train")))), data


def fit(config, *callbacks, precision=None):
    """Train with the callbacks that could make the host wait, but without checkpoints; return the method."""
    method, data = make_both(config)
    trainer = make_trainer(config, Record(), FiniteGradients(), Dashboard(pictures=False), *callbacks)
    if precision is not None:
        trainer.strategy.precision_plugin = precision
    trainer.fit(method, data)
    return method


class Gradients(pl.Callback):
    """Keeps the gradients of the first step at which they are finite."""

    def __init__(self):
        self.first = None

    def on_before_optimizer_step(self, trainer, method, optimizer):  # noqa: ARG002
        # A loss scaler starts with too large a scale, and skips steps until it fits.
        gradients = [weight.grad for weight in method.parameters() if weight.grad is not None]
        if self.first is None and all(gradient.isfinite().all() for gradient in gradients):
            self.first = [gradient.clone() for gradient in gradients]


def test_every_method_that_trains_is_in_the_suite():
    options = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    options = {option for option in options if trains_on(compose(f"method={option}")) != "nothing"}
    assert options == {settings[0].removeprefix("method=") for settings in METHODS.values()}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_stops_resumes_tests_and_predicts(make_config, device, name, tmp_path, monkeypatch):
    deterministic = [] if device == "cpu" else ["hardware.deterministic=warn"]
    train(make_config(*METHODS[name], *deterministic, name="whole"))
    after_transfer = EpisodeDataModule.on_after_batch_transfer

    def interrupted(data, batch, dataloader_idx):
        if data.trainer.training and batch.share.start == data.train_episodes // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_transfer(data, batch, dataloader_idx)

    monkeypatch.setattr(EpisodeDataModule, "on_after_batch_transfer", interrupted)
    with pytest.raises(Interrupted):
        train(make_config(*METHODS[name], *deterministic, name="stopped"))
    monkeypatch.setattr(EpisodeDataModule, "on_after_batch_transfer", after_transfer)
    train(make_config(*METHODS[name], *deterministic, "resume=auto", name="stopped"))

    kept, results = [], []
    for run in (tmp_path / "whole", tmp_path / "stopped"):
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
        kept.append([last[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")])
        results.append(json.loads((run / "results.json").read_text()))
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)
    assert results[0]["accuracy"] == results[1]["accuracy"] > 0
    assert results[0]["validations"] == results[1]["validations"]
    assert results[0]["precision"] == "32-true"
    assert ("accelerator" in results[0]["machine"]) == (device == "cuda")

    group = f"hardware={group_of(device)}"
    accuracy = evaluate(
        compose(
            *(f"checkpoint={tmp_path / 'whole'}", group, *deterministic, f"out={tmp_path / 'out'}"),
            *(f"cache_dir={results[0]['config']['cache_dir']}",),
            name="evaluate",
        )
    )
    assert accuracy == pytest.approx(results[0]["accuracy"], abs=2e-3)
    predictor = make_predictor(compose(f"checkpoint={tmp_path / 'whole'}", group, name="predict"))
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (28, 28, 1), dtype=np.uint8) for _ in range(6)]
    logits = predictor.learn({"a": pixels[:2], "b": pixels[2:3]})(pixels[3:])
    assert logits.shape == (3, 2) and logits.isfinite().all() and logits.device.type == "cpu"


@pytest.mark.parametrize("name", METHODS)
def test_logits_and_gradients_are_those_of_the_cpu(make_config, device, name):
    loop = ["method.task_batching=loop"] * name.startswith("maml")
    config = make_config(*METHODS[name], "encoder.filters=16", "train.way=5", *loop)
    if name.startswith("classifier"):
        config.method.classes = 5
    errors = []
    for number in range(5):
        batch = noise(2, 5, number)
        config.seed = number
        methods = [make_method(config) for _ in range(2)]
        methods[1].to(device)
        if loop:
            methods[1].task_batching = "vmap"
        per_device = []
        for method, target in zip(methods, ("cpu", device), strict=True):
            moved = batch.apply(lambda tensor, target=target: tensor.to(target))
            if isinstance(method, MAML):
                meta = method.meta_gradient(moved)
                per_device.append((meta.logits, meta.gradients))
                continue
            logits = torch.stack([method(episode) for episode in moved.tasks()])
            if isinstance(method, Baseline):
                method.log_training = lambda *_: None  # it needs a trainer
                images = moved.query[:1]
                gather = lambda *_, images=images, **__: images  # noqa: E731
                method.training_step(ClassBatch(None, moved.query_labels[:1], Share([]), gather), 0).backward()
            else:
                method.loss(logits.flatten(0, 1), moved.query_labels.flatten()).backward()
            per_device.append((logits, [weight.grad for weight in method.parameters() if weight.grad is not None]))
        (logits, gradients), (device_logits, device_gradients) = per_device
        assert device_logits.device.type == device
        errors.append((relative_error([device_logits], [logits]), relative_error(device_gradients, gradients)))
    # Rounding may change which of two almost equal pixels max pooling takes: allow it in a minority of the batches.
    assert np.median(errors, axis=0).max() < 1e-4, errors


@pytest.mark.parametrize("name", METHODS)
def test_the_accuracy_is_that_of_the_cpu(make_config, device, name):
    filters = "encoder.filters=16" if device == "cuda" else "encoder.filters=4"
    changes = [*METHODS[name], filters, f"test.episodes={SIZES[device]['compared']}"]
    changes += ["method.test_inner_steps=1"] * name.startswith("maml")
    trained = fit(make_config(*changes, on="cpu")).state_dict()
    accuracies = []
    for on in ("cpu", device):
        config = make_config(*changes, on=on)
        method, data = make_both(config)
        method.load_state_dict(trained)
        make_trainer(config).test(method, data, verbose=False)
        accuracies.append(method.estimates["test"].accuracy)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=1e-3)


def test_images_are_on_the_gpu_if_they_fit_and_are_copied_asynchronously_otherwise(device, monkeypatch):
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (50, 20, 20, 3), dtype=np.uint8))
    positions = torch.tensor([[3, 1], [49, 3]])
    expected = ImageTable(pixels, "standardise")(positions)
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    fitting, limited = ImageTable(pixels, "standardise"), ImageTable(pixels, "standardise")
    gathered = [fitting(positions, device=target)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 * pixels.nbytes, 4 * pixels.nbytes))
    gathered.append(limited(positions, device=target))
    with no_waits(device):
        gathered += [fitting(positions, device=target), limited(positions, device=target)]
    for images in gathered:
        assert images.device == target
        torch.testing.assert_close(images.cpu(), expected)
    if device == "cuda":
        resident = fitting._resident[target]
        assert resident is not None and resident.device == target and limited._resident[target] is None


class HostWatch(TorchDispatchMode):
    """On the CPU: fail at every operation for which the host would wait for a GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if "_local_scalar_dense" in name or "nonzero" in name:
            # Except for the optimizer's step counters, which are on the host.
            frames = traceback.extract_stack()
            assert any("/torch/optim/" in frame.filename for frame in frames), "".join(traceback.format_list(frames))
        return operation(*args, **(kwargs or {}))


class no_waits:  # noqa: N801
    """A context in which the host must not wait for the device."""

    def __init__(self, device):
        self.device, self.watch = device, HostWatch()

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.watch.__enter__()

    def __exit__(self, *error):
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        else:
            self.watch.__exit__(*error)


class WithoutWaits(pl.Callback):
    """Forbids the host to wait between the end of the second step and the start of the last one."""

    def __init__(self, device, steps):
        self.context, self.steps, self.entered = no_waits(device), steps, False

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):  # noqa: ARG002
        if batch_idx == 1:
            self.context.__enter__()
            self.entered = True

    def on_train_batch_start(self, trainer, method, batch, batch_idx):  # noqa: ARG002
        if batch_idx == self.steps - 1:
            self.stop()

    def stop(self):
        if self.entered:
            self.entered = False
            self.context.__exit__(None, None, None)


@pytest.mark.parametrize("room", [True, False], ids=["resident", "copied"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_the_host_never_waits_for_a_training_step(make_config, device, name, precision, room, monkeypatch):
    if device == "cpu" and (precision != "32-true" or not room):
        pytest.skip("the same on the CPU")
    for module in ("callbacks", "progress"):
        monkeypatch.setattr(f"fewshot.{module}.asynchronous", lambda _: True)
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    steps = 8
    changes = [*METHODS[name], f"hardware.precision={precision}", "log_every=1000", "train.meta_batch=4"]
    changes += [f"train.episodes={steps * 4}", f"val.every={steps * 4}", f"checkpoint_every={steps * 4}"]
    changes += ["method.task_batching=vmap"] * name.startswith("maml")
    watched = WithoutWaits(device, steps)
    try:
        fit(make_config(*changes), watched)
    finally:
        stopped = not watched.entered
        watched.stop()
    assert stopped


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_learns_nearly_the_same(make_config, device, name, precision):
    changes = [*METHODS[name], "encoder.filters=16", "train.meta_batch=4"]
    if name.startswith("maml"):
        changes += ["method.inner_learning_rate=0.01", "method.clip_norm=null"]
    exact, half = Gradients(), Gradients()
    fit(make_config(*changes), exact)
    if device == "cpu" and precision == "16-mixed":  # Lightning has it for a GPU only
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        method = fit(make_config(*changes), half, precision=plugin)
    else:
        method = fit(make_config(*changes, f"hardware.precision={precision}"), half)
    assert all(tensor.isfinite().all() for tensor in method.state_dict().values())
    # With a loss scaler, the first finite step is a later one, on different episodes.
    if precision == "bf16-mixed":
        assert relative_error(half.first, exact.first) < 0.4
    assert 0 < method.estimates["val"].accuracy <= 1


def test_a_loss_scale_reaches_maml_and_is_removed(make_config, monkeypatch):
    """A scaler in float32, where nothing underflows, changes neither the gradients nor their clipping."""
    steps = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        kept = Gradients()
        plugin = None if scaler is None else MixedPrecision("16-mixed", "cpu", scaler)
        if plugin is not None:
            monkeypatch.setattr(plugin, "autocast_context_manager", nullcontext)
        config = make_config("method=maml", "train.meta_batch=2", "method.clip_norm=0.001", "hardware=cpu")
        steps.append((kept, fit(config, kept, precision=plugin)))
    (plain, unscaled_method), (scaled, scaled_method) = steps
    assert relative_error(scaled.first, plain.first) < 1e-4
    assert relative_error(scaled_method.parameters(), unscaled_method.parameters()) < 1e-3


@pytest.mark.parametrize("name", ["protonet", "maml", "maml_1st"])
def test_a_compiled_encoder_computes_the_same(make_config, device, name, monkeypatch):
    if device == "cpu":  # the C++ compiler takes minutes
        compile_ = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))
    torch._dynamo.reset()
    changes = [*METHODS[name], "train.episodes=8", "val.every=8", "checkpoint_every=8"]
    changes += ["method.task_batching=vmap"] * name.startswith("maml")
    plain, compiled = Gradients(), Gradients()
    fit(make_config(*changes), plain)
    fit(make_config(*changes, "hardware.compile=true"), compiled)
    assert relative_error(compiled.first, plain.first) < 1e-3


class Memory(pl.Callback):
    """Records the memory of the GPU in use after each step, in bytes."""

    def __init__(self):
        self.used = []

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):  # noqa: ARG002
        self.used.append(torch.cuda.memory_allocated())


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_memory_stays_flat(make_config, device, name):
    if device == "cpu":
        pytest.skip("the memory of a GPU is measured")
    steps = SIZES[device]["steps"]
    batch = 4 if name == "maml" else 1
    every = steps * batch
    memory = Memory()
    fit(
        make_config(*METHODS[name], f"train.episodes={every}", f"val.every={every}", f"checkpoint_every={every}"),
        memory,
    )
    third = steps // 3
    assert len(memory.used) == steps
    assert max(memory.used[-third:]) <= 1.01 * max(memory.used[third : 2 * third])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_processes_compute_what_one_does(device, backend, cache, tmp_path):
    if device == "cpu":
        pytest.skip("tests/test_distributed.py has two processes on the CPU")
    if backend == "nccl" and GPUS < 2:
        pytest.skip("NCCL needs a GPU for each process")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = ["train.meta_batch=5", "train.episodes=6", "val.every=6", "val.episodes=4", "checkpoint_every=6"]
    changes += [
        "train.way=5",
        "query=3",
        "train.query=2",
        "encoder.filters=8",
        "hardware.precision=64-true",
        f"cache_dir={cache}",
    ]
    alone = {}
    for name in ("protonet", "maml"):
        config = compose(f"method={name}", *changes, f"hardware={group_of(device)}", f"run_dir={tmp_path / name}")
        alone[name] = fit(config).state_dict()
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=fit_as_rank, args=(rank, port, device, backend, changes, tmp_path)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(500)  # a busy machine is slow
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    for name, expected in alone.items():
        states = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        # Not the statistics of batch norm, which differ, nor the biases before it, whose gradients are rounding errors.
        trained = [key for key in expected if not re.search(r"running|batches|\.0\.bias$", key)]
        for key in trained:
            torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
            torch.testing.assert_close(states[0][key], expected[key].cpu(), rtol=1e-6, atol=1e-7)


def group_of(device):
    return "cpu" if device == "cpu" else "gpu"


def fit_as_rank(rank, port, device, backend, changes, folder):
    """Train as one of two processes; two on one GPU are two nodes, since Lightning gives each process its own GPU."""
    shared = backend == "gloo"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"NODE_RANK": str(rank if shared else 0), "LOCAL_RANK": str(0 if shared else rank)}
    rank_zero_only.rank = rank
    torch.distributed.Backend.default_device_backend_map[device] = backend
    hardware = ["hardware=multi_node", f"hardware.accelerator={group_of(device)}"]
    hardware += [f"hardware.num_nodes={2 if shared else 1}", f"hardware.devices={1 if shared else 2}"]
    for name in ("protonet", "maml"):
        config = compose(f"method={name}", *hardware, *changes, f"run_dir={folder / name}_{rank}")
        method = fit(config)
        assert torch.distributed.get_backend() == backend and torch.distributed.get_world_size() == 2
        state = {key: tensor.cpu() for key, tensor in method.state_dict().items()}
        torch.save(state, folder / f"{name}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_full_gpu_ends_the_run_with_a_line_that_says_what_to_lower(make_config, device, name, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + 16 * 2**20
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    else:
        monkeypatch.setattr(MAML if name == "maml" else MetricMethod, "training_step", full)
    try:
        with pytest.raises(FewShotError, match=r"^the memory of the GPU.* is full; lower .*; or resume this one"):
            train(make_config(*METHODS[name], "train.query=10"))
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
