"""What has to hold on a GPU: whole where there is one, and tiny on the CPU where there is none.

``python -m pytest tests/gpu`` takes under four minutes on one card and needs no network. Where only the packages of the
project itself and pytest are installed, ``--confcutdir=tests/gpu`` leaves out what the other tests need.
"""

import gc
import json
import multiprocessing
import os
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
from fewshot.config import compose
from fewshot.dashboard import Dashboard
from fewshot.data.episodes import Episode
from fewshot.data.images import ImageTable
from fewshot.errors import FewShotError, Interrupted
from fewshot.evaluation import evaluate
from fewshot.methods.base import MetricMethod
from fewshot.methods.maml import MAML
from fewshot.prediction import make_predictor
from fewshot.training import make_data, make_method, make_trainer, train

CARDS = torch.cuda.device_count()
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.skipif(CARDS == 0, reason="PyTorch finds no GPU")),
    pytest.param("cpu", marks=pytest.mark.skipif(CARDS > 0, reason="the GPU does the same, and more of it")),
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
}
# How much of everything: on a GPU, and on the CPU.
SIZES = {
    "cuda": {"filters": 64, "episodes": 48, "tested": 200, "compared": 1000, "steps": 300},
    "cpu": {"filters": 4, "episodes": 8, "tested": 4, "compared": 20, "steps": 30},
}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 is float32: TF32 has a significand of ten bits. What a test switches on is switched off again."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matrix product
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("banks")


@pytest.fixture
def ask(device, cache, tmp_path):
    """The configuration of a small training on the device."""

    def configure(*overrides, name="run", on=device):
        size = SIZES[device]
        return compose(
            *(f"hardware={'cpu' if on == 'cpu' else 'gpu'}", f"encoder.filters={size['filters']}"),
            *("query=3", "train.query=3", f"train.episodes={size['episodes']}", f"val.every={size['episodes'] // 2}"),
            *("val.episodes=4", f"test.episodes={size['tested']}", f"checkpoint_every={size['episodes'] // 4}"),
            *("pictures=false", f"run_dir={tmp_path / name}", f"cache_dir={cache}"),
            *overrides,
        )

    return configure


def noise(count, way, seed):
    """A meta-batch in which no two pixels are equal, as those of letters are: max pooling would choose by rounding."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(way).expand(count, way)
    support, query = (torch.randn(count, way * shot, 28, 28, 1, generator=generator).movedim(-1, -3) for shot in (1, 3))
    return Episode(support, labels, query, labels.repeat_interleave(3, 1), way)


def relative(found, expected):
    """How far tensors are apart, over the norm of those that are expected."""
    one, other = (torch.cat([tensor.detach().double().cpu().flatten() for tensor in of]) for of in (found, expected))
    return float((one - other).norm() / other.norm())


def learn(config, *callbacks, precision=None):
    """Train without ``train``, with the callbacks that can make the host wait; returns the method."""
    method, data = make_method(config), make_data(config)
    trainer = make_trainer(config, Record(), FiniteGradients(), Dashboard(pictures=False), *callbacks)
    if precision is not None:
        trainer.strategy.precision_plugin = precision
    trainer.fit(method, data)
    return method


class Gradients(pl.Callback):
    """Keeps what the optimizer gets at the first step whose gradient is finite: no other has changed the weights."""

    def __init__(self):
        self.first = None

    def on_before_optimizer_step(self, trainer, method, optimizer):  # noqa: ARG002
        # A loss scaler begins too high, and passes over the steps until its scale fits.
        if self.first is None and all(of.grad.isfinite().all() for of in method.parameters()):
            self.first = [of.grad.clone() for of in method.parameters()]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_stops_resumes_tests_and_predicts(ask, device, name, tmp_path, monkeypatch):
    again = [] if device == "cpu" else ["hardware.deterministic=warn"]
    train(ask(*METHODS[name], *again, name="whole"))
    kind = MAML if name.startswith("maml") else MetricMethod
    step = kind.training_step

    def interrupted(self, meta_batch, batch_idx):
        if meta_batch.share.start == self.trainer.datamodule.train_episodes // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, meta_batch, batch_idx)

    monkeypatch.setattr(kind, "training_step", interrupted)
    with pytest.raises(Interrupted):
        train(ask(*METHODS[name], *again, name="stopped"))
    monkeypatch.setattr(kind, "training_step", step)
    train(ask(*METHODS[name], *again, "resume=auto", name="stopped"))

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

    group = f"hardware={'cpu' if device == 'cpu' else 'gpu'}"
    accuracy = evaluate(
        compose(
            *(f"checkpoint={tmp_path / 'whole'}", group, *again, f"out={tmp_path / 'out'}"),
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
def test_logits_and_gradients_are_those_of_the_cpu(ask, device, name):
    loop = ["method.task_batching=loop"] * name.startswith("maml")
    config = ask(*METHODS[name], "encoder.filters=16", "train.way=5", *loop)
    found = []
    for number in range(5):
        batch = noise(2, 5, number)
        config.seed = number
        methods = [make_method(config) for _ in range(2)]
        methods[1].to(device)
        if loop:
            methods[1].task_batching = "vmap"
        per_device = []
        for method, on in zip(methods, ("cpu", device), strict=True):
            moved = batch.apply(lambda of, on=on: of.to(on))
            if isinstance(method, MAML):
                meta = method.meta_gradient(moved)
                per_device.append((meta.logits, meta.gradients))
                continue
            logits = torch.stack([method(episode) for episode in moved.tasks()])
            method.loss(logits.flatten(0, 1), moved.query_labels.flatten()).backward()
            per_device.append((logits, [of.grad for of in method.parameters() if of.grad is not None]))
        (logits, gradients), (of_device, gradients_of_device) = per_device
        assert of_device.device.type == device
        found.append((relative([of_device], [logits]), relative(gradients_of_device, gradients)))
    # Of two pixels that are equal but for rounding, max pooling may take the other one; so not every episode counts.
    assert np.median(found, axis=0).max() < 1e-4, found


@pytest.mark.parametrize("name", METHODS)
def test_the_accuracy_is_that_of_the_cpu(ask, device, name):
    filters = "encoder.filters=16" if device == "cuda" else "encoder.filters=4"
    changes = [*METHODS[name], filters, f"test.episodes={SIZES[device]['compared']}"]
    changes += ["method.test_inner_steps=1"] * name.startswith("maml")
    trained = learn(ask(*changes, on="cpu")).state_dict()
    accuracies = []
    for on in ("cpu", device):
        config = ask(*changes, on=on)
        method = make_method(config)
        method.load_state_dict(trained)
        make_trainer(config).test(method, make_data(config), verbose=False)
        accuracies.append(method.estimates["test"].accuracy)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=1e-3)


def test_images_lie_on_the_gpu_where_they_fit_and_are_carried_there_where_they_do_not(device, monkeypatch):
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (50, 20, 20, 3), dtype=np.uint8))
    positions = torch.tensor([[3, 1], [49, 3]])
    expected = ImageTable(pixels, "standardise")(positions)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    fitting, limited = ImageTable(pixels, "standardise"), ImageTable(pixels, "standardise")
    found = [fitting(positions, device=place)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 * pixels.nbytes, 4 * pixels.nbytes))
    found.append(limited(positions, device=place))
    with no_waits(device):
        found += [fitting(positions, device=place), limited(positions, device=place)]
    for images in found:
        assert images.device == place
        torch.testing.assert_close(images.cpu(), expected)
    if device == "cuda":
        resident = fitting._resident[place]
        assert resident is not None and resident.device == place and limited._resident[place] is None


class HostWatch(TorchDispatchMode):
    """On the CPU: fails at every operation for which the host would wait for a GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if "_local_scalar_dense" in name or "nonzero" in name:
            # The optimizer counts its steps in tensors that are on the host.
            frames = traceback.extract_stack()
            assert any("/torch/optim/" in frame.filename for frame in frames), "".join(traceback.format_list(frames))
        return operation(*args, **(kwargs or {}))


class no_waits:  # noqa: N801
    """Around what must not make the host wait for the device."""

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
    """From the end of the second step to the beginning of the last, whatever happens in between."""

    def __init__(self, device, steps):
        self.around, self.steps, self.within = no_waits(device), steps, False

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):  # noqa: ARG002
        if batch_idx == 1:
            self.around.__enter__()
            self.within = True

    def on_train_batch_start(self, trainer, method, batch, batch_idx):  # noqa: ARG002
        if batch_idx == self.steps - 1:
            self.stop()

    def stop(self):
        if self.within:
            self.within = False
            self.around.__exit__(None, None, None)


@pytest.mark.parametrize("room", [True, False], ids=["resident", "carried"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_the_host_never_waits_for_a_training_step(ask, device, name, precision, room, monkeypatch):
    if device == "cpu" and (precision != "32-true" or not room):
        pytest.skip("on the CPU it is the same program")
    monkeypatch.setattr("fewshot.callbacks.asynchronous", lambda _: True)
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    steps = 8
    changes = [*METHODS[name], f"hardware.precision={precision}", "log_every=1000", "train.meta_batch=4"]
    changes += [f"train.episodes={steps * 4}", f"val.every={steps * 4}", f"checkpoint_every={steps * 4}"]
    changes += ["method.task_batching=vmap"] * name.startswith("maml")
    watched = WithoutWaits(device, steps)
    try:
        learn(ask(*changes), watched)
    finally:
        stopped = not watched.within
        watched.stop()
    assert stopped


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_learns_nearly_the_same(ask, device, name, precision):
    changes = [*METHODS[name], "encoder.filters=16", "train.meta_batch=4"]
    if name.startswith("maml"):
        changes += ["method.inner_learning_rate=0.01", "method.clip_norm=null"]
    exact, half = Gradients(), Gradients()
    learn(ask(*changes), exact)
    if device == "cpu" and precision == "16-mixed":  # Lightning has it for a GPU only
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        method = learn(ask(*changes), half, precision=plugin)
    else:
        method = learn(ask(*changes, f"hardware.precision={precision}"), half)
    assert all(of.isfinite().all() for of in method.state_dict().values())
    # Of the scaled runs a later step: other episodes, from the same weights.
    if precision == "bf16-mixed":
        assert relative(half.first, exact.first) < 0.4
    assert 0 < method.estimates["val"].accuracy <= 1


def test_a_loss_scale_reaches_maml_and_is_taken_out_again(ask, monkeypatch):
    """A scaler in float32, where nothing is lost: the gradients and their bound are those without one."""
    steps = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        kept = Gradients()
        plugin = None if scaler is None else MixedPrecision("16-mixed", "cpu", scaler)
        if plugin is not None:
            monkeypatch.setattr(plugin, "autocast_context_manager", nullcontext)
        config = ask("method=maml", "train.meta_batch=2", "method.clip_norm=0.001", "hardware=cpu")
        steps.append((kept, learn(config, kept, precision=plugin)))
    (plain, expected), (scaled, found) = steps
    assert relative(scaled.first, plain.first) < 1e-4
    assert relative(found.parameters(), expected.parameters()) < 1e-3


@pytest.mark.parametrize("name", ["protonet", "maml", "maml_1st"])
def test_a_compiled_encoder_computes_the_same(ask, device, name, monkeypatch):
    if device == "cpu":  # the C++ compiler takes minutes, and is not what is tested
        compile_ = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))
    torch._dynamo.reset()
    changes = [*METHODS[name], "train.episodes=8", "val.every=8", "checkpoint_every=8"]
    changes += ["method.task_batching=vmap"] * name.startswith("maml")
    plain, compiled = Gradients(), Gradients()
    learn(ask(*changes), plain)
    learn(ask(*changes, "hardware.compile=true"), compiled)
    assert relative(compiled.first, plain.first) < 1e-3


class Memory(pl.Callback):
    """What is held after each step."""

    def __init__(self, device):
        self.device, self.held = device, []

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):  # noqa: ARG002
        if self.device == "cuda":
            self.held.append(torch.cuda.memory_allocated())
        else:
            gc.collect()
            self.held.append(sum(torch.is_tensor(of) for of in gc.get_objects()))


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_memory_stays_flat(ask, device, name):
    steps = SIZES[device]["steps"]
    batch = 4 if name == "maml" else 1
    every = steps * batch
    memory = Memory(device)
    learn(
        ask(*METHODS[name], f"train.episodes={every}", f"val.every={every}", f"checkpoint_every={every}"),
        memory,
    )
    third = steps // 3
    assert len(memory.held) == steps
    assert max(memory.held[-third:]) <= 1.01 * max(memory.held[third : 2 * third])


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_processes_learn_what_one_does(device, backend, cache, tmp_path):
    if backend == "nccl" and CARDS < 2:
        pytest.skip("NCCL needs a GPU for each process")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = ["train.meta_batch=5", "train.episodes=6", "val.every=6", "checkpoint_every=6", "query=3", "train.way=5"]
    changes += ["train.query=2", "encoder.filters=8", "hardware.precision=64-true", f"cache_dir={cache}"]
    alone = {}
    for name in ("protonet", "maml"):
        config = compose(f"method={name}", *changes, f"hardware={group_of(device)}", f"run_dir={tmp_path / name}")
        alone[name] = learn(config).state_dict()
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=learn_as, args=(rank, port, device, backend, changes, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
        process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    for name, expected in alone.items():
        found = [torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        learnt = [of for of in expected if "running" not in of and "batches" not in of and not of.endswith(".0.bias")]
        for key in learnt:
            torch.testing.assert_close(found[0][key], found[1][key], rtol=0, atol=0)
            torch.testing.assert_close(found[0][key], expected[key].cpu(), rtol=1e-6, atol=1e-7)


def group_of(device):
    return "cpu" if device == "cpu" else "gpu"


def learn_as(rank, port, device, backend, changes, folder):
    """Be one of two processes: on one card each a node of its own, for Lightning gives no card to two."""
    shared = backend == "gloo"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"NODE_RANK": str(rank if shared else 0), "LOCAL_RANK": str(0 if shared else rank)}
    rank_zero_only.rank = rank
    torch.distributed.Backend.default_device_backend_map[device] = backend
    hardware = ["hardware=multi_node", f"hardware.accelerator={group_of(device)}"]
    hardware += [f"hardware.num_nodes={2 if shared else 1}", f"hardware.devices={1 if shared else 2}"]
    for name in ("protonet", "maml"):
        config = compose(f"method={name}", *hardware, *changes, f"run_dir={folder / name}_{rank}")
        method = learn(config)
        assert torch.distributed.get_backend() == backend and torch.distributed.get_world_size() == 2
        torch.save({key: of.cpu() for key, of in method.state_dict().items()}, folder / f"{name}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_card_that_is_full_ends_in_a_line_that_says_what_to_lower(ask, device, name, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() + 16 * 2**20
        torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    else:
        monkeypatch.setattr(MAML if name == "maml" else MetricMethod, "training_step", full)
    try:
        with pytest.raises(FewShotError, match=r"^the memory of the GPU.* is full; lower .*; or go on with this one"):
            train(ask(*METHODS[name], "train.query=10"))
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
