import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fewshot.config import ROOT, compose
from fewshot.data.episodes import EpisodeNumber
from fewshot.data.images import normalise
from fewshot.errors import FewShotError
from fewshot.metrics import EpisodeAccuracy
from fewshot.results import read_results
from fewshot.training import make_data, train

TINY = [
    *("train.episodes=6", "train.way=3", "val.every=4", "val.episodes=3", "test.episodes=5"),
    *("encoder.filters=16", "pictures=false"),
]
KEYS = (
    "dataset method distance encoder experiment budget way shot query accuracy ci95 episodes seed train_seconds "
    "train_episodes_per_second machine versions commit overrides"
)


@pytest.fixture
def tiny(cache_dir: Path, tmp_path: Path):
    """Composes the configuration of a tiny run with its own directory."""

    def configure(*overrides: str, run: str = "run") -> DictConfig:
        return compose(*TINY, f"run_dir={tmp_path / run}", f"cache_dir={cache_dir}", *overrides)

    return configure


def results_of(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def test_a_run_from_another_directory_writes_only_to_its_run_directory(cli, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run_dir = tmp_path / "run"
    done = cli(*TINY, "seed=3", "pictures=true", f"hydra.run.dir={run_dir}", cwd=tmp_path / "elsewhere", fresh=True)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    results = results_of(run_dir)
    assert set(KEYS.split()) <= set(results)
    assert (results["dataset"], results["method"], results["distance"]) == ("glyphs", "protonet", "l2")
    assert (results["way"], results["shot"], results["query"], results["seed"]) == (5, 1, 15, 3)
    assert results["episodes"] == 5 and 0 < results["accuracy"] <= 1 and 0 < results["ci95"] < 1
    assert results["overrides"] == [*TINY, "seed=3", "pictures=true"]
    assert [(v["trained_episodes"], v["episodes"]) for v in results["validations"]] == [(4, 3), (6, 3)]
    assert results["val_accuracy"] == pytest.approx(max(v["accuracy"] for v in results["validations"]))
    assert f"{results['accuracy']:.2%}" in done.stdout
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((run_dir / "protonet-l2-5way-1shot-seed3").glob("events.*"))
    assert (run_dir / ".hydra" / "config.yaml").exists()
    listed = json.loads((run_dir / "classes.json").read_text())
    assert set(listed) == {"train", "val", "test"}
    assert not set(listed["test"]) & {*listed["train"], *listed["val"]}


def test_the_speed_counts_all_training_episodes_also_those_after_the_best_validation(tiny, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.5, 0.7])
    compute = EpisodeAccuracy.compute
    monkeypatch.setattr(EpisodeAccuracy, "compute", lambda self: compute(self)._replace(accuracy=next(accuracies)))
    train(tiny())
    results = results_of(tmp_path / "run")
    assert [point["accuracy"] for point in results["validations"]] == [0.9, 0.5] and results["accuracy"] == 0.7
    assert results["train_episodes_per_second"] * results["train_seconds"] == pytest.approx(6)


def test_a_schedule_for_all_steps_is_refused_where_there_are_fewer(tiny):
    pieces = "hardware.accumulate_grad_batches=2"
    with pytest.raises(FewShotError, match=r"schedule\.T_max=6 counts .* so the training would end .*meta_batch=2, or"):
        train(tiny("schedule=cosine", pieces))
    train(tiny("schedule=cosine", pieces, "train.meta_batch=2"))


def test_equal_seeds_give_equal_runs_and_different_seeds_do_not(tiny, tmp_path):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny(f"seed={seed}", run=run))
    weights = {
        run: torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in "abc"
    }
    assert all(torch.equal(weights["a"][name], weights["b"][name]) for name in weights["a"])
    assert not all(torch.equal(weights["a"][name], weights["c"][name]) for name in weights["a"])
    assert results_of(tmp_path / "a")["accuracy"] == results_of(tmp_path / "b")["accuracy"]


def test_the_tested_weights_are_the_best_on_validation(tiny, tmp_path, monkeypatch):
    from fewshot.methods.protonet import PrototypicalNetwork  # noqa: PLC0415

    # A training that makes the encoder worse at every step: the first validation is the best.
    learn = PrototypicalNetwork.training_step

    def spoil(self, meta_batch, batch_idx):
        for parameter in self.parameters():
            parameter.data.mul_(0.5 if self.global_step >= 4 else 1)
        return learn(self, meta_batch, batch_idx)

    monkeypatch.setattr(PrototypicalNetwork, "training_step", spoil)
    validation = train(tiny("val.episodes=20", "train.episodes=12"))
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 4
    assert results_of(tmp_path / "run")["val_accuracy"] == validation
    assert best["hyper_parameters"]["method"]["_target_"].endswith("PrototypicalNetwork")


def test_training_learns(tiny, tmp_path):
    few, many = (
        tiny(f"train.episodes={n}", "val.every=100", "train.way=20", "test.episodes=100", run=str(n)) for n in (1, 100)
    )
    train(few), train(many)
    before, after = results_of(tmp_path / "1"), results_of(tmp_path / "100")
    assert after["accuracy"] - after["ci95"] > before["accuracy"] + before["ci95"] + 0.1


@pytest.mark.parametrize(
    "choice",
    [
        ("method=matching", "distance=scaled_cosine", "distance.learn=true"),
        ("method=matching_fce", "shot=2"),
        ("method=protonet", "train.meta_batch=2", "hardware.precision=64-true"),
        ("method=maml", "train.way=5", "train.meta_batch=4", "method.clip_norm=1", "hardware.precision=bf16-mixed"),
        ("method=maml", "method.order=1", "train.way=5", "way=5", "method.task_batching=vmap"),
    ],
)
def test_every_method_trains_and_tests(tiny, tmp_path, choice):
    train(tiny(*choice))
    results = results_of(tmp_path / "run")
    assert results["method"] == choice[0].removeprefix("method=") and results["accuracy"] > 0
    assert (results["distance"] is None) == (results["method"] == "maml")
    weights = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    if "distance.learn=true" in choice:
        assert weights["distance.log_scale"].exp().item() != pytest.approx(10)


@pytest.mark.parametrize("name", ["protonet", "matching_fce", "maml"])
def test_the_reported_accuracy_equals_that_of_solving_each_episode_separately(tiny, tmp_path, name):
    config = tiny(f"method={name}", "train.way=5", "test.episodes=25")
    train(config)
    data = make_data(config)
    data.setup()
    method = instantiate(config.method).eval()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    method.load_state_dict(checkpoint["state_dict"])
    right = 0
    for number in range(25):
        episode = data.datasets["test"][EpisodeNumber(0, number)]
        with torch.no_grad():
            logits = method(episode.load(lambda index: normalise(data.bank.images[index], config.dataset.normalise)))
        right += (logits.argmax(1) == episode.query_labels).sum().item()
    assert results_of(tmp_path / "run")["accuracy"] == right / (25 * 75)


@pytest.mark.slow
def test_a_sweep_runs_every_combination(cli, tmp_path):
    done = cli("-m", *TINY, "shot=1,2", "distance=l2,cosine", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = {(r["shot"], r["distance"]) for r in (results_of(tmp_path / str(number)) for number in range(4))}
    assert found == {(1, "l2"), (1, "cosine"), (2, "l2"), (2, "cosine")}


def test_a_job_that_fails_is_named_at_the_end_of_a_sweep_and_the_others_run(cli, tmp_path):
    done = cli("-m", *TINY, "way=9999,5,1", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 1
    assert (tmp_path / "1" / "results.json").exists() and not (tmp_path / "0" / "results.json").exists()
    first, *failed = done.stderr.splitlines()[-3:]
    assert first == "error: 2 of the jobs failed"
    assert (
        "way=9999: way=9999 is more than" in failed[0]
        and "way=1: way=1 must be a whole number of at least 2" in failed[1]
    )
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_the_study_of_distances_runs_and_is_drawn(cli, tmp_path):
    runs, study = tmp_path / "runs", "+experiment/matching_distance=glob(*)"
    done = cli("-m", study, *TINY, "dataset=glyphs", f"hydra.sweep.dir={runs}")
    assert done.returncode == 0, done.stderr
    found = [results_of(runs / str(number))["config"]["distance"] for number in range(7)]
    assert sorted(distance["scale"] for distance in found if "scale" in distance) == [1, 5, 10, 10, 20, 40]
    drawn = cli("figure=distance_study", f"runs={runs}", f"out={tmp_path}", script="figure.py")
    assert drawn.returncode == 0, drawn.stderr
    assert len((tmp_path / "distance_study.md").read_text().splitlines()) == 2 + 7


def test_the_cells_of_a_sweep_are_reported(cli, tmp_path):
    cells = ["+experiment/omniglot=glob(proto*)", "shot=1,5"]
    subdir = "hydra.sweep.subdir=${choices.experiment}_${way}way_${shot}shot/${seed}"
    done = cli(
        "-m", *cells, "budget=cpu", *TINY, "val.every=6", f"hydra.sweep.dir={tmp_path}", subdir, "dataset=glyphs"
    )
    assert done.returncode == 0, done.stderr
    for shot in (1, 5):
        results = results_of(tmp_path / "omniglot" / f"protonet_5way_{shot}shot" / "0")
        assert (results["experiment"], results["budget"]) == ("omniglot/protonet", "cpu")
        assert (results["shot"], results["machine"]["threads"]) == (shot, torch.get_num_threads())
    assert [result["shot"] for result in read_results(str(tmp_path))] == [1, 5]


def test_train_keys_default_to_those_of_the_test_unless_the_method_sets_them():
    config = compose("way=7", "shot=3", "query=2", "run_dir=x")
    assert (config.train.way, config.train.shot, config.train.query) == (20, 3, 5)
    assert compose("train.query=9", "run_dir=x").train.query == 9


def test_help_shows_the_groups_and_every_key_with_a_comment(cli):
    shown = cli("--help").stdout
    for group, options in {
        "dataset": "cifar_fs|cub|fc100|folder|glyphs|miniimagenet|omniglot|tieredimagenet|torchvision",
        "distance": "cosine|l2|scaled_cosine",
    }.items():
        assert f"# {group}={options}" in shown
    config = compose("run_dir=x")
    keys = [key for key, value in config.items() if not OmegaConf.is_config(value) and key != "callbacks"]
    for group in ("train", "val", "test", "dataset", "method", "encoder", "hardware"):
        keys += [str(key) for key, value in config[group].items() if not OmegaConf.is_config(value)]
    for key in keys:
        if not str(key).startswith("_"):
            assert re.search(rf"^ *{key}: .*  # \w", shown, re.MULTILINE), key


BAD = {
    ("way=five", "wya=5", "distance=cosin", "optimizer.lrr=1"): (
        "(did you mean cosine?)",
        "way=five",
        "'wya'",
        "(did you mean way?)",
        "(did you mean optimizer.lr?)",
    ),
    ("dataset=cifar",): ("dataset=cifar is not an option. Choose one of cifar_fs, ",),
    (
        "way=1",
        "train.episodes=0",
        "optimizer.lr=-1",
        "distance=scaled_cosine",
        "distance.scale=-1",
        "encoder.filters=0",
    ): (
        "way=1 must be a whole number of at least 2; distance.scale=-1 must be a number above 0; ",
        "encoder.filters=0 must be a whole number of at least 1; ",
        "optimizer.lr=-1 must be a number above 0 and at most 1,000,000; train.episodes=0 must be a whole number",
    ),
    ("hardware.precision=17", "hardware.compile=maybe", "schedule.step_size=often", "dataset.source.samples=1.5"): (
        "dataset.source.samples=1.5 must be a whole number; schedule.step_size=often must be a whole number",
        "hardware.precision=17 must be ",
        "hardware.compile=maybe must be true or false",
    ),
    ("method.learning_rate=0.1", "method.halve_every=9", "method.on_nan=skip"): (
        "method.learning_rate is now optimizer.lr; method.halve_every is now schedule.step_size",
        "method.on_nan is now train.on_nan",
    ),
    ("way=9999",): ("way=9999 is more than",),
    ("shot=15",): ("shot=15 and query=15 need 30 images of each class",),
    ("hydra.run.dir=/proc/none/run",): ("/proc/none",),
    ("cache_dir=/proc/none",): ("cache_dir=PATH",),
    ("dataset=omniglot", "data_dir=/proc/none"): ("data_dir=PATH",),
    ("dataset=miniimagenet", "data_dir=/proc/none"): ("/proc/none/miniimagenet",),
    ("hardware=gpu",): ("gpu",),
    ("dataset.normalise=no", "train.on_nan=pray"): (
        "dataset.normalise=no must be range, standardise or plain; train.on_nan=pray must be stop or skip",
    ),
    ("method=maml", "method.order=3", "method.task_batching=magic"): (
        "method.order=3 must be 1 or 2; method.task_batching=magic must be auto, loop, threads or vmap",
    ),
    ("method=maml", "train.way=6"): ("made for 5 classes, and the episode has 6",),
    ("method=matching_fce", "method.unrolling_steps=0"): ("method.unrolling_steps=0 must be at least 1",),
}


@pytest.mark.parametrize("overrides", BAD)
def test_a_mistake_ends_in_one_clear_line(cli, overrides, tmp_path):
    run_dir = [] if overrides[0].startswith("hydra.run.dir") else [f"hydra.run.dir={tmp_path / 'run'}"]
    done = cli(*overrides, *run_dir)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in BAD[overrides]), lines[0]
    assert len(lines) == (3 if "dataset=miniimagenet" in overrides else 1), done.stderr
    assert not (tmp_path / "run" / "results.json").exists()


def test_an_interrupt_ends_in_one_line_that_says_how_to_resume(cache_dir, tmp_path):
    overrides = [*TINY, "train.episodes=100000", f"cache_dir={cache_dir}", f"hydra.run.dir={tmp_path}"]
    command = [sys.executable, str(ROOT / "src" / "train.py"), *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not (tmp_path / "checkpoints" / "last.ckpt").exists():
            assert running.poll() is None
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    expected = f"error: interrupted; resume with: python {ROOT / 'src' / 'train.py'} resume={tmp_path}"
    assert errors.strip().splitlines() == ["finishing the current step; interrupt again to stop immediately", expected]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.real_data
@pytest.mark.parametrize(("dataset", "expected"), [("omniglot", (1028, 172, 423)), ("miniimagenet", (64, 16, 20))])
@pytest.mark.slow
def test_the_real_data_trains_and_tests(cli, real_data, tmp_path, dataset, expected):
    run_dir = tmp_path / "run"
    done = cli(*TINY, f"dataset={dataset}", f"data_dir={real_data}", f"hydra.run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert results_of(run_dir)["dataset"] == dataset
    listed = json.loads((run_dir / "classes.json").read_text())
    classes = {split: {name.split("@")[0] for name in names} for split, names in listed.items()}
    assert not classes["train"] & classes["val"] | classes["train"] & classes["test"] | classes["val"] & classes["test"]
    assert tuple(map(len, classes.values())) == expected


def test_the_default_run_directory_is_in_outputs_of_the_project(cli):
    shown = cli("--cfg", "all", "--package", "hydra.run", "--resolve", cwd="/").stdout
    assert f"dir: {ROOT / 'outputs'}" in shown
