"""Two processes on the CPU, with gloo, compared with one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning.utilities import rank_zero_only

from fewshot import embeddings
from fewshot.callbacks import Record
from fewshot.config import ROOT, compose, compose_unresolved
from fewshot.errors import FewShotError, Interrupted
from fewshot.methods.base import MetricMethod
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.training import make_data, make_method, make_trainer, train
from programs import FORKED

SMALL = [
    "train.way=5",
    "train.query=2",
    "query=3",
    "encoder.filters=8",
    "val.every=100",
    "val.episodes=5",
    "test.episodes=7",
    "log_every=1",
    "seed=3",
]
# Steps of five episodes and of one episode: shares of three and two, then of one and zero.
UNEVEN = ["train.meta_batch=5", "train.episodes=6", "hardware.precision=64-true"]
CASES = {
    "protonet": ["method=protonet", *UNEVEN],
    "protonet_in_pieces": ["method=protonet", *UNEVEN, "train.episodes=9", "hardware.accumulate_grad_batches=2"],
    "matching": ["method=matching", "distance=scaled_cosine", "distance.learn=true", "transform=crop", *UNEVEN],
    "matching_fce": ["method=matching_fce", *UNEVEN],
    "maml": ["method=maml", "transform=crop_flip", *UNEVEN],
    "maml_1st": ["method=maml", "method.order=1", "method.clip_norm=0.1", *UNEVEN],
    # One step: the next one starts from what Adam makes of rounded gradients.
    "protonet_in_bfloat16": [
        "method=protonet",
        "train.meta_batch=2",
        "train.episodes=2",
        "hardware.precision=bf16-mixed",
    ],
}


class Kept(pl.Callback):
    """Records the gradients of each step, and the embeddings of the last validation."""

    def __init__(self):
        self.steps, self.embeddings = [], None

    def on_validation_epoch_end(self, trainer, method):  # noqa: ARG002
        if isinstance(method, MetricMethod):
            self.embeddings = method._embeddings.embeddings

    def on_before_optimizer_step(self, trainer, method, optimizer):  # noqa: ARG002
        self.steps.append({name: parameter.grad.clone() for name, parameter in method.named_parameters()})


def learn(overrides):
    """Test untrained weights, then train and validate, on one thread: rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return learn_on_this_thread(overrides)
    finally:
        torch.set_num_threads(threads)


def learn_on_this_thread(overrides):
    config = compose(*SMALL, *overrides)
    method, data, record, kept = make_method(config), make_data(config), Record(), Kept()
    trainer = make_trainer(config, record, kept)
    trainer.test(method, data, verbose=False)
    trainer.fit(method, data)
    return {
        "test": tuple(method.estimates["test"]),
        "validations": record.validations,
        "gradients": kept.steps,
        "weights": dict(method.named_parameters()),
        "state": method.state_dict(),
        "embedded": kept.embeddings,
    }


def learn_all(rank, folder, cache_dir):
    for name, overrides in CASES.items():
        found = learn([*overrides, "hardware=ddp_cpu", f"run_dir={folder / name}", f"cache_dir={cache_dir}"])
        torch.save(found, folder / f"{name}_{rank}.pt")


def as_rank(rank, port, work, *arguments):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_zero_only.rank = rank
    embeddings.EMBEDDED_TOGETHER = 32  # otherwise one process would have all images
    work(rank, *arguments)


def on_two(work, *arguments):
    """Run it in two processes; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORKED.Process(target=as_rank, args=(rank, port, work, *arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()  # if it hangs
        process.join()
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def found(tmp_path_factory, cache_dir):
    """The records of two processes, by case and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    learn(["train.episodes=1", "hardware=cpu", f"run_dir={folder / 'warm'}", f"cache_dir={cache_dir}"])
    assert on_two(learn_all, folder, cache_dir) == [0, 0]
    return {name: [torch.load(folder / f"{name}_{rank}.pt") for rank in (0, 1)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_step_of_two_processes_equals_that_of_one_on_all_episodes(found, name, tmp_path, cache_dir):
    first, second = found[name]
    for key in ("test", "validations", "gradients", "weights"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    alone = [override for override in CASES[name] if "accumulate" not in override]
    expected = learn([*alone, "hardware=cpu", f"run_dir={tmp_path}", f"cache_dir={cache_dir}"])
    assert first["test"] == expected["test"] and first["test"][2] == 7
    assert len(first["gradients"]) == len(expected["gradients"]) == (1 if "bfloat16" in name else 2)
    assert max(gradient.abs().max() for gradient in first["gradients"][-1].values()) > 1e-3
    for ours, of_one in zip(first["gradients"], expected["gradients"], strict=True):
        found_all, expected_all = (
            torch.cat([gradient.flatten() for gradient in determined(gradients).values()])
            for gradients in (ours, of_one)
        )
        # The gradient of one episode is the same in both, bit for bit. Only the sum over the two episodes is rounded
        # differently: two processes add in float32, and one may add in bfloat16, whose significand has 8 bits. That
        # is one rounding of each number, by at most 2^-8 of it.
        near = 2**-8 if "bfloat16" in name else 1e-9
        assert (found_all - expected_all).norm() <= near * expected_all.norm()
    if "bfloat16" not in name:  # Adam makes whole steps of the smallest differences
        torch.testing.assert_close(determined(first["weights"]), determined(expected["weights"]), rtol=0, atol=1e-8)


def determined(gradients):
    """All but the biases before a batch norm, which cancels them: their gradients are only rounding errors."""
    return {name: gradient for name, gradient in gradients.items() if not re.fullmatch(r"encoder\.\d\.0\.bias", name)}


@pytest.mark.parametrize("name", ["protonet_in_pieces", "maml"])
@pytest.mark.slow
def test_the_validated_weights_are_those_that_rank_0_saves(found, name, tmp_path, cache_dir):
    config = compose(*SMALL, *CASES[name], "hardware=cpu", f"run_dir={tmp_path}", f"cache_dir={cache_dir}")
    method, data = make_method(config), make_data(config)
    method.double().load_state_dict(found[name][0]["state"])
    kept = Kept()
    make_trainer(config, kept).validate(method, data, verbose=False)
    (validation,) = found[name][0]["validations"]
    torch.testing.assert_close(found[name][0]["embedded"], kept.embeddings, rtol=1e-9, atol=1e-12)
    assert validation == {"trained_episodes": config.train.episodes, **method.estimates["val"]._asdict()}


def draw(stop_at):
    """Make each process draw random numbers in training, rank 1 one more; and stop it after some episodes."""
    learn_step = PrototypicalNetwork.training_step

    def step(self, meta_batch, batch_idx):
        if meta_batch.share.start == stop_at and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn_step(self, meta_batch, batch_idx) * torch.rand(1 + self.global_rank)[-1]

    PrototypicalNetwork.training_step = step


def attempt(rank, run_dir, cache_dir, stop_at=None):  # noqa: ARG001
    draw(stop_at)
    try:
        train(compose(*SMALL, *RUN, f"run_dir={run_dir}", f"cache_dir={cache_dir}", "resume=auto"))
    except Interrupted as interrupted:
        raise SystemExit(interrupted.status) from None


RUN = ["hardware=ddp_cpu", "train.meta_batch=3", "train.episodes=22", "val.every=9", "checkpoint_every=6"]


@pytest.mark.slow
def test_a_run_stopped_by_one_process_and_resumed_ends_like_an_uninterrupted_one(tmp_path, cache_dir):
    assert on_two(attempt, tmp_path / "whole", cache_dir) == [0, 0]
    assert on_two(attempt, tmp_path / "stopped", cache_dir, 12) == [128 + signal.SIGTERM] * 2
    stopped = torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stopped["EpisodeDataModule"] == {"trained": 15}
    assert on_two(attempt, tmp_path / "stopped", cache_dir) == [0, 0]
    runs = []
    for name in ("whole", "stopped"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        runs.append(
            [
                {key: results[key] for key in ("accuracy", "ci95", "val_accuracy", "validations", "meta_batch")},
                [last[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")],
                [last["callbacks"]["Record"][key] for key in ("random", "random_elsewhere")],
            ]
        )
        assert results["machine"]["processes"] == 2
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def children(process):
    return [int(number) for number in subprocess.run(["pgrep", "-P", str(process)], capture_output=True).stdout.split()]


def end(signal_, whom, run_dir, *overrides):
    """Start the command, send a signal once it has saved something, and return its status and its errors."""
    last = run_dir / "checkpoints" / "last.ckpt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    command = [sys.executable, str(ROOT / "src" / "train.py"), *map(str, overrides)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            while not last.exists() or last.stat().st_mtime_ns == before:
                assert running.poll() is None, running.stderr.read()
                time.sleep(0.2)
            (child,) = children(running.pid)
            os.kill({"first": running.pid, "second": child, "all": -running.pid}[whom], signal_)
            _, errors = running.communicate(timeout=100)  # waits until all have ended
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    return running.returncode, errors.strip().splitlines()


@pytest.mark.slow
def test_a_process_that_ends_ends_all_and_the_run_can_be_resumed(cache_dir, tmp_path):
    resume = f"resume with: python {ROOT / 'src' / 'train.py'} resume={tmp_path}"
    start = [*SMALL, "hardware=ddp_cpu", "train.episodes=1000000", "checkpoint_every=6", "val.every=1000000"]
    start += [f"cache_dir={cache_dir}", f"hydra.run.dir={tmp_path}"]
    assert end(signal.SIGINT, "all", tmp_path, *start) == (
        130,
        ["finishing the current step; interrupt again to stop immediately", f"error: interrupted; {resume}"],
    )
    status, errors = end(signal.SIGKILL, "second", tmp_path, f"resume={tmp_path}")
    # Lightning checks every few seconds whether processes have died, and may notice it first.
    if status == 1:
        assert errors == [f"error: process 1 of 2 has ended with status -9, and the run with it; {resume}"]
    else:
        assert status == -signal.SIGKILL and "terminated with code -9" in errors[0]
    status, errors = end(signal.SIGKILL, "first", tmp_path, f"resume={tmp_path}")
    assert status == -signal.SIGKILL
    assert errors == [f"error: process 1: the first process has ended, and the run with it; {resume}"]


def test_incompatible_settings_are_rejected(tmp_path, cache_dir, monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    here = [f"run_dir={tmp_path}", f"cache_dir={cache_dir}"]
    for overrides, message in {
        (
            "hardware=ddp_cpu",
            "hydra.mode=MULTIRUN",
        ): r"hardware\.devices=2: the jobs of a sweep .* have one process each",
        ("hardware=ddp_cpu", "val.episodes=1"): r"val\.episodes=1 cannot be shared out to 2",
        ("hardware=cpu", "hardware.precision=16-mixed"): "16-mixed needs a GPU; choose hardware.precision=auto",
        (
            "method=maml",
            "hardware.accumulate_grad_batches=2",
        ): r"accumulate_grad_batches=2 must be 1: method=maml already takes",
    }.items():
        HydraConfig.instance().set_config(compose_unresolved(*here, *overrides))
        with pytest.raises(FewShotError, match=message):
            train(compose(*here, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_another_machine_can_be_ended(number, cache_dir, tmp_path):
    settings = [*SMALL, "hardware=ddp_cpu", "hardware.devices=1", "hardware.num_nodes=2"]
    command = [sys.executable, str(ROOT / "src" / "train.py"), *settings, f"hydra.run.dir={tmp_path / 'run'}"]
    environment = {**os.environ, "FEWSHOT_CACHE_DIR": str(cache_dir)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert any("waiting for all processes on 2 machines" in line for line in running.stdout)
            time.sleep(3)
            running.send_signal(number)
            assert running.wait(60) == -number
        finally:
            running.kill()
