"""Runs that are killed, interrupted, moved, started twice, or short of disk space."""

import json
import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from pytorch_lightning.plugins import MixedPrecision

import fewshot.training
from conftest import log_of
from fewshot.callbacks import FiniteGradients
from fewshot.config import compose
from fewshot.directories import newest_run
from fewshot.errors import FewShotError, Interrupted
from fewshot.training import make_data, train
from programs import start_training

KILLS = int(os.environ.get("FEWSHOT_KILLS", "20"))
SHORT = [
    "train.episodes=22",
    "train.way=5",
    "train.query=1",
    "query=3",
    "encoder.filters=8",
    "val.every=8",
    "val.episodes=6",
    "test.episodes=8",
    "checkpoint_every=3",
    "log_every=1",
    "hardware=cpu",
]
METHODS = {
    "protonet": ["method=protonet", "schedule.step_size=5", "transform=crop_flip"],
    "matching": ["method=matching", "distance=scaled_cosine", "distance.learn=true", "pictures=false"],
    "matching_fce": ["method=matching_fce", "pictures=false"],
    "maml": ["method=maml", "train.meta_batch=2", "schedule=cosine", "transform=crop_flip_colour", "pictures=false"],
    "maml_1st": ["method=maml", "method.order=1", "train.meta_batch=3", "pictures=false"],
}


def finish(overrides):
    process = start_training(*overrides)
    process.join()
    assert process.exitcode == 0


def scalars(run_dir, tag):
    return [(event.step, event.value) for event in log_of(run_dir).Scalars(tag)]


def outcome(run_dir):
    """Everything that must not depend on whether a run was interrupted."""
    results = json.loads((run_dir / "results.json").read_text())
    kept = {key: results[key] for key in ("accuracy", "ci95", "episodes", "val_accuracy", "validations")}
    logged = {tag: scalars(run_dir, tag) for tag in ("1 train/loss", "2 val/accuracy", "3 test/accuracy")}
    loaded = {
        name: torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last")
    }
    weights = {name: checkpoint["state_dict"] for name, checkpoint in loaded.items()}
    optimizers = {
        name: [checkpoint["optimizer_states"], checkpoint["lr_schedulers"]] for name, checkpoint in loaded.items()
    }
    return SimpleNamespace(kept=kept, logged=logged, weights=weights, optimizers=optimizers)


def assert_same(found, expected):
    assert found.kept == expected.kept
    assert found.logged == expected.logged
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
    torch.testing.assert_close(found.optimizers, expected.optimizers, rtol=0, atol=0)


@pytest.fixture
def run(tmp_path, cache_dir):
    """The overrides of a run in its own directory."""

    def overrides(name, *more):
        return [*SHORT, f"run_dir={tmp_path / name}", f"cache_dir={cache_dir}", *more]

    return overrides


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(run, tmp_path, method):
    make_data(compose(*run("bank", *METHODS[method]))).setup()  # so that no run below builds it
    finish(run("first", *METHODS[method]))  # takes longer if it is the first process: the package is imported for it
    began = time.monotonic()
    finish(run("whole", *METHODS[method]))
    seconds = time.monotonic() - began
    whole = outcome(tmp_path / "whole")
    assert len(whole.kept["validations"]) == 3
    moments, kills, number = random.Random(method), 0, 0
    while kills < KILLS:
        process = start_training(*run(f"killed{number}", *METHODS[method], "resume=auto"))
        process.join(moments.uniform(0.2, 0.7) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert_same(outcome(tmp_path / f"killed{number}"), whole)
            number += 1
    finish(run(f"killed{number}", *METHODS[method], "resume=auto"))
    assert_same(outcome(tmp_path / f"killed{number}"), whole)
    assert not list(tmp_path.rglob("*.partial*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_dir):
    """The outcome of a run of MAML."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    finish([*SHORT, "method=maml", "train.meta_batch=2", f"run_dir={run_dir}", f"cache_dir={cache_dir}"])
    return outcome(run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_run_with_a_checkpoint_of_the_last_step(run, tmp_path, uninterrupted, number):
    interrupted = run("stopped", "method=maml", "train.meta_batch=2", "checkpoint_every=1000")
    process = start_training(*interrupted)
    while not list((tmp_path / "stopped").glob("*/events.*")):  # the training begins right after
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert f"resume={tmp_path / 'stopped'}" in (tmp_path / "stopped" / "message").read_text()
    if not (tmp_path / "stopped" / "checkpoints" / "last.ckpt").exists():
        pytest.fail("the signal came before the first step")
    finish([*interrupted, "resume=auto"])
    assert_same(outcome(tmp_path / "stopped"), uninterrupted)


def test_a_signal_outside_training_ends_the_run_at_once(run, tmp_path, monkeypatch):
    from fewshot.data.datamodule import EpisodeDataModule  # noqa: PLC0415

    monkeypatch.setattr(EpisodeDataModule, "setup", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"resume={tmp_path / 'run'}"):
        train(compose(*run("run")))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_can_be_resumed_after_its_directory_was_moved(run, tmp_path):
    finish(run("whole"))
    train(compose(*run("there", "train.episodes=8")))
    shutil.move(tmp_path / "there", tmp_path / "here")
    train(compose(*run("here", "resume=auto")))
    assert not (tmp_path / "there").exists()
    found, expected = outcome(tmp_path / "here"), outcome(tmp_path / "whole")
    assert found.kept == expected.kept


def test_a_run_of_a_version_without_a_key_that_is_off_can_be_resumed(run, tmp_path):
    finish(run("whole"))
    train(compose(*run("older", "train.episodes=8")))
    for path in (tmp_path / "older" / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        for encoder in (checkpoint["hyper_parameters"]["encoder"], checkpoint["hyper_parameters"]["method"]["encoder"]):
            assert encoder.pop("signed") is False
        torch.save(checkpoint, path)
    train(compose(*run("older", "resume=auto")))
    assert outcome(tmp_path / "older").kept == outcome(tmp_path / "whole").kept


def test_a_complete_run_is_reported_again_and_not_run_again(run, tmp_path, capsys):
    train(compose(*run("run")))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.*")}
    accuracy = json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"]
    capsys.readouterr()
    train(compose(*run("run", "resume=auto")))
    assert f"{accuracy:.2%}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.*")} == before
    train(compose(*run("run", "resume=auto", "test.episodes=9")))  # requests more episodes
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    assert results["episodes"] == 9
    path.write_text(json.dumps(results | {"checkpoint": "run/checkpoints/last.ckpt"}))
    with pytest.raises(FewShotError, match=r"is broken \(it is the result of an evaluation\); delete it"):
        train(compose(*run("run", "resume=auto")))


def test_a_directory_holds_one_run_and_one_at_a_time(run, tmp_path):
    train(compose(*run("run")))
    here = tmp_path / "run"
    with pytest.raises(FewShotError, match=f"{here} already contains a run: resume it with resume={here}"):
        train(compose(*run("run")))
    with pytest.raises(FewShotError, match=r"run with different settings: seed=1 \(the run has 0\); "):
        train(compose(*run("run", "resume=auto", "seed=1")))
    with pytest.raises(FewShotError, match=r"distance=cosine \(the run has l2\)"):
        train(compose(*run("run", "resume=auto", "distance=cosine")))
    with pytest.raises(
        FewShotError, match=r"train\.episodes=21 is less than the 22 that the run .* has trained on already"
    ):
        train(compose(*run("run", "resume=auto", "train.episodes=21")))
    with FileLock(here / ".lock"), pytest.raises(FewShotError, match=f"another run is using {here}"):
        train(compose(*run("run", "resume=auto")))


@pytest.mark.parametrize(
    "forge",
    [
        lambda checkpoint: checkpoint["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0]["params"].pop(),
        lambda checkpoint: checkpoint["optimizer_states"][0].pop("param_groups"),
        lambda checkpoint: checkpoint["optimizer_states"].clear(),
        lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0].update(betas=[0.9]),
        lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0].update(lr="fast"),
        lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0].update(lr=float("nan")),
        lambda checkpoint: checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].fill_(float("nan")),
        lambda checkpoint: checkpoint["optimizer_states"][0]["state"][0]["exp_avg_sq"].fill_(float("inf")),
        lambda checkpoint: checkpoint["lr_schedulers"][0].update(step=3),
        lambda checkpoint: checkpoint["lr_schedulers"][0].update(last_epoch=[]),
        lambda checkpoint: checkpoint["EpisodeDataModule"].update(trained=-5),
        lambda checkpoint: checkpoint["loops"].clear(),
        lambda checkpoint: checkpoint["lr_schedulers"].clear(),
        lambda checkpoint: checkpoint["callbacks"]["Record"].pop("random"),
        lambda checkpoint: checkpoint["state_dict"].popitem(),
    ],
)
def test_a_run_with_a_manipulated_checkpoint_is_rejected_in_one_line(run, tmp_path, forge):
    train(compose(*run("run", "schedule.step_size=5")))
    (tmp_path / "run" / "results.json").unlink()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    forge(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(FewShotError, match=f"the run cannot be resumed: {path} is broken, or from a different version"):
        train(compose(*run("run", "schedule.step_size=5", "resume=auto", "train.episodes=24")))


@pytest.mark.slow
def test_resume_by_directory_takes_the_configuration_from_there(cli, tmp_path):
    here = tmp_path / "run"
    done = cli(*SHORT, "seed=5", "shot=2", f"hydra.run.dir={here}")
    assert done.returncode == 0, done.stderr
    (here / "results.json").unlink()
    started = (here / ".hydra" / "overrides.yaml").read_text()
    done = cli(f"resume={here}", "test.episodes=9")
    assert done.returncode == 0, done.stderr
    results = json.loads((here / "results.json").read_text())
    assert (results["seed"], results["shot"], results["episodes"]) == (5, 2, 9)
    assert results["overrides"] == [*SHORT, "seed=5", "shot=2"]
    assert (here / ".hydra" / "overrides.yaml").read_text() == started
    for overrides, message in (
        ([f"resume={tmp_path / 'none'}"], f"there is no {tmp_path}/none to resume; name the directory"),
        ([f"resume={here}", "distance=cosine"], "distance=cosine: a resumed run keeps its distance"),
        ([f"resume={here}", "seed=6"], "run with different settings: seed=6 (the run has 5)"),
    ):
        done = cli(*overrides)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()
    (tmp_path / "photos").mkdir()
    assert "to resume from" in cli(f"resume={tmp_path / 'photos'}").stderr
    assert not list((tmp_path / "photos").iterdir())


def test_a_rejected_command_leaves_the_record_of_a_run_unchanged(cli, run, tmp_path):
    here = tmp_path / "run"
    train(compose(*run("run", "train.episodes=4", "test.episodes=2")))
    record = here / ".hydra" / "overrides.yaml"
    record.parent.mkdir()
    record.write_text("- train.episodes=4\n")
    done = cli(*SHORT, "train.way=9", f"hydra.run.dir={here}")
    assert done.returncode == 1 and "already contains a run" in done.stderr, done.stderr
    assert record.read_text() == "- train.episodes=4\n" and list(record.parent.iterdir()) == [record]


def test_a_directory_is_taken_by_a_run_that_saved_something_or_is_using_it(tmp_path):
    resolve = OmegaConf.create({"subdir": f"${{fewshot_output_subdir:${{resume}},{tmp_path}}}", "resume": None})
    assert resolve.subdir == ".hydra"
    with FileLock(tmp_path / ".lock"):
        assert resolve.subdir is None
    assert resolve.subdir == ".hydra"  # that run ended before it had saved anything
    for name in ("results.json", "checkpoints/last.ckpt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        for resolve.resume in (None, "auto", str(tmp_path)):
            assert resolve.subdir is None
        path.unlink()
    for resolve.resume, subdir in (("auto", ".hydra"), (str(tmp_path), None)):
        assert resolve.subdir == subdir


def spoil(monkeypatch, at, value):
    """Let the gradient of the training step after ``at`` episodes, or any of these numbers, be ``value``."""
    from fewshot.methods.maml import MAML  # noqa: PLC0415
    from fewshot.methods.protonet import PrototypicalNetwork  # noqa: PLC0415

    learn, meta_gradient = PrototypicalNetwork.training_step, MAML.meta_gradient

    def factor(method):
        return value if method.trainer.datamodule.step.start in (at if isinstance(at, range) else [at]) else 1

    def spoiled(self, meta_batch):
        result = meta_gradient(self, meta_batch)
        return result._replace(gradients=[gradient * factor(self) for gradient in result.gradients])

    monkeypatch.setattr(PrototypicalNetwork, "training_step", lambda self, *batch: learn(self, *batch) * factor(self))
    monkeypatch.setattr(MAML, "meta_gradient", spoiled)


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_episodes(run, tmp_path, monkeypatch, name):
    spoil(monkeypatch, at=14, value=float("nan"))
    with pytest.raises(FewShotError) as caught:
        train(compose(*run("run", f"method={name}", "train.meta_batch=2", "seed=4", "val.every=10")))
    assert "gradient of training episode 14 is nan (seed=4, epoch 1, number 4 to 5)" in str(caught.value)
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["EpisodeDataModule"] == {"trained": 14}
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["optimizer=adamw", "optimizer.weight_decay=1e38"], "Lower optimizer.weight_decay or optimizer.lr in"),
        (["optimizer=sgd", "optimizer.momentum=1e38"], "Lower optimizer.momentum or optimizer.lr in"),
        (["schedule=cosine", "schedule.eta_min=1e38"], "Lower optimizer.lr in"),
        (["method=maml", "method.inner_learning_rate=1e38"], "Lower optimizer.lr or method.inner_learning_rate in"),
    ],
)
def test_absurd_numbers_end_in_advice_that_names_them(run, overrides, advice):
    with pytest.raises(FewShotError, match=f"gradient of training episode .*{re.escape(advice)}"):
        train(compose(*run("run", *overrides)))


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_step_without_a_finite_gradient_can_be_skipped_and_is_counted(run, tmp_path, monkeypatch, name, capsys):
    spoil(monkeypatch, at=14, value=float("inf"))
    train(compose(*run("run", f"method={name}", "train.meta_batch=2", "train.on_nan=skip")))
    assert "skipped: the gradient of training episode 14 is" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["skipped_steps"] == 1
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_run_that_skips_more_than_a_tenth_of_its_steps_fails(run, tmp_path, monkeypatch, name):
    spoil(monkeypatch, at=range(1000), value=float("nan"))
    message = r"2 of the run's 11 training steps were skipped .* train\.on_nan=skip allows 10%"
    with pytest.raises(FewShotError, match=message):
        train(compose(*run("run", f"method={name}", "train.meta_batch=2", "train.on_nan=skip")))
    assert not (tmp_path / "run" / "results.json").exists()


def test_weights_that_are_not_finite_are_never_saved_nor_resumed(run, tmp_path, monkeypatch):
    from fewshot.methods.protonet import PrototypicalNetwork  # noqa: PLC0415

    learn = PrototypicalNetwork.training_step

    def overflow(self, *batch):
        if self.trainer.datamodule.trained == 5:
            next(self.encoder.parameters()).data.fill_(float("inf"))
        return learn(self, *batch) if self.trainer.datamodule.trained != 5 else 0 * next(self.parameters()).sum()

    monkeypatch.setattr(FiniteGradients, "on_before_optimizer_step", lambda *_: None)
    with monkeypatch.context() as spoiled:
        spoiled.setattr(PrototypicalNetwork, "training_step", overflow)
        with pytest.raises(FewShotError, match=r"encoder\.\S+ of the network after 6 training episodes is not finite"):
            train(compose(*run("run")))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last = torch.load(path, weights_only=True)
    assert last["EpisodeDataModule"] == {"trained": 3}
    last["state_dict"]["encoder.0.0.weight"][0] = float("nan")
    torch.save(last, path)
    with pytest.raises(FewShotError, match="its weights are not finite"):
        train(compose(*run("run", "resume=auto")))


@pytest.fixture
def half_precision(monkeypatch):
    """16-mixed on the CPU, which Lightning keeps to GPUs."""
    trainer = pl.Trainer

    def scaled(precision, plugins, **settings):  # noqa: ARG001
        return trainer(plugins=[*plugins, MixedPrecision("16-mixed", "cpu")], **settings)

    monkeypatch.setattr(pl, "Trainer", scaled)
    monkeypatch.setattr(fewshot.training, "check", lambda _: None)  # it looks at the trainer's signature


@pytest.mark.usefixtures("half_precision")
def test_a_loss_scaler_may_skip_steps_but_not_all(run, tmp_path, monkeypatch):
    def last(name):
        loaded = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert all(weight.isfinite().all() for weight in loaded["state_dict"].values())
        return loaded["MixedPrecision"]["scale"], loaded["optimizer_states"][0]["state"][0]["step"].item()

    train(compose(*run("whole")))
    scale, steps = last("whole")
    assert steps > 10 and scale == 2 ** (16 - (22 - steps))  # each skipped step halved it
    spoil(monkeypatch, at=range(10, 1000), value=float("nan"))
    with pytest.raises(FewShotError, match=r"gradient of training episode \d+ is nan .* however small the loss scale"):
        train(compose(*run("run", "train.episodes=100")))
    last("run")
    train(compose(*run("skipped", "train.episodes=12", "train.on_nan=skip")))
    skipped = json.loads((tmp_path / "skipped" / "results.json").read_text())["skipped_steps"]
    assert last("skipped") == (2 ** (16 - skipped), 12 - skipped) and skipped >= 2


def test_a_validation_no_better_than_guessing_is_reported_once(run, monkeypatch, capsys):
    from fewshot.methods.protonet import PrototypicalNetwork  # noqa: PLC0415

    monkeypatch.setattr(
        PrototypicalNetwork, "evaluate", lambda _, batch: torch.zeros(*batch.episodes.query.shape[:2], 5)
    )
    train(compose(*run("run")))
    assert capsys.readouterr().out.count("warning: after 8 training episodes this is what guessing gives (20.00%)") == 1


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system with little space."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m tmpfs {path} 2>/dev/null"):
        pytest.skip("no right to mount a small tmpfs")
    yield path
    os.system(f"umount -l {path}")


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_it_can_be_resumed_later(cli, run, small_disk, tmp_path):
    finish(run("whole", "encoder.filters=32"))
    here = small_disk / "run"
    filler = small_disk / "filler"
    options = [*SHORT, "encoder.filters=32", f"hydra.run.dir={here}", "resume=auto"]
    lines = []
    for free in (100_000, 550_000, 400_000):  # the first checkpoint, the next, then the best one
        usage = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - free)))
        done = cli(*options)
        assert done.returncode == 1, done.stdout
        assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        lines.append(done.stderr)
        filler.unlink()
    assert "last.ckpt" in lines[0] or "best.ckpt" in lines[0]
    done = cli(*options)
    assert done.returncode == 0, done.stderr
    assert outcome(here).kept == outcome(tmp_path / "whole").kept


def test_the_newest_run_is_the_complete_one_that_ended_last(tmp_path):
    with pytest.raises(FewShotError, match=r"there is no complete run below .*; train one, or name one"):
        newest_run(tmp_path / "outputs")
    for age, (name, files) in enumerate(
        {
            "2/interrupted": ["checkpoints/best.ckpt"],
            "2/evaluation": ["results.json"],
            "1/new": ["checkpoints/best.ckpt", "results.json"],
            "2/old": ["checkpoints/best.ckpt", "results.json"],
        }.items()
    ):
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (1000 - age, 1000 - age))
    assert newest_run(tmp_path) == tmp_path / "1" / "new"


@pytest.mark.parametrize("restorable", [True, False])
def test_the_tested_weights_are_those_of_the_best_validation(run, tmp_path, monkeypatch, restorable):
    """A kill can come between the writing of best.ckpt and that of last.ckpt."""
    accuracies = iter([0.5, 0.9] if restorable else [0.5, 0.4, 0.9])
    method = fewshot.training.make_method(compose(*run("unused")))
    compute = type(method.val_accuracy).compute
    monkeypatch.setattr(
        type(method.val_accuracy), "compute", lambda self: compute(self)._replace(accuracy=next(accuracies, 0.1))
    )
    every = ["val.every=3"] if restorable else ["val.every=2"]
    train(compose(*run("longer", "train.episodes=6", *every)))
    accuracies = iter([0.5] if restorable else [0.5, 0.4])
    # Stopped after its first checkpoint, as if before the validation of episode 6.
    shorter = run("killed", "train.episodes=3" if restorable else "train.episodes=4", *every)
    train(compose(*shorter))
    best = tmp_path / "killed" / "checkpoints" / "best.ckpt"
    shutil.copy(tmp_path / "longer" / "checkpoints" / "best.ckpt", best)
    (tmp_path / "killed" / "results.json").unlink()
    resumed = [*shorter, "resume=auto"]
    if restorable:
        train(compose(*resumed))
        assert torch.load(best, weights_only=True)["EpisodeDataModule"]["trained"] == 3
    else:
        with pytest.raises(FewShotError, match=r"after 6 training episodes, but the best validation was after 2:"):
            train(compose(*resumed))


def test_before_the_first_checkpoint_nothing_is_said_of_a_checkpoint(run, monkeypatch):
    spoil(monkeypatch, at=0, value=float("nan"))
    with pytest.raises(FewShotError) as caught:
        train(compose(*run("run", "method=maml", "train.meta_batch=2")))
    assert "checkpoint" not in str(caught.value) and "resume=" not in str(caught.value)
    assert str(caught.value).endswith("in a new run, or skip such steps with train.on_nan=skip")
