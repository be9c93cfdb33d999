"""``train.also_on=val``: the second stage of Snell et al., which trains on the validation classes, too."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from fewshot import runs
from fewshot.config import compose
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.report import report
from fewshot.results import find_results, settings
from fewshot.training import make_data, train

TINY = ["train.episodes=6", "train.way=3", "val.every=4", "val.episodes=3", "test.episodes=5", "query=2"]


@pytest.fixture
def tiny(cache_dir: Path, tmp_path: Path):
    """Composes the configuration of a tiny run with its own directory."""

    def configure(*overrides: str, run: str = "run") -> DictConfig:
        return compose(*TINY, f"run_dir={tmp_path / run}", f"cache_dir={cache_dir}", *overrides)

    return configure


@pytest.mark.parametrize("method", ["protonet", "classifier"])
def test_the_validation_classes_are_trained_on_and_the_final_weights_tested(tiny, tmp_path, method):
    classes = {split: make_data(tiny()).bank.class_names(split) for split in ("train", "val", "test")}
    assert train(tiny("train.also_on=val", f"method={method}")) is None
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["val_accuracy"] is None and results["validations"] == []
    assert results["data"]["classes"] == {
        "train": len(classes["train"]) + len(classes["val"]),
        "val": 0,
        "test": len(classes["test"]),
    }
    listed = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert sorted(listed["train"]) == sorted(classes["train"] + classes["val"]) and listed["test"] == classes["test"]
    weights = [
        torch.load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_episodes_draw_from_both_splits(tiny):
    data = make_data(tiny("train.also_on=val", "train.way=20"))
    data.setup()
    whole = data.datasets["train"]
    assert len(whole.counts) == len(data.bank.class_names("train"))
    alone = make_data(tiny())
    alone.setup()
    assert len(whole.counts) == len(alone.datasets["train"].counts) + len(alone.datasets["val"].counts)
    assert "val" not in data.datasets
    # The test episodes are the same images.
    number = runs_first_episode(data), runs_first_episode(alone)
    assert torch.equal(*number)


def runs_first_episode(data) -> torch.Tensor:
    from fewshot.data.episodes import EpisodeNumber  # noqa: PLC0415

    return data.bank.images[data.datasets["test"][EpisodeNumber(0, 0)].query]


def test_an_interrupted_run_resumes_to_the_same_weights(tiny, tmp_path):
    train(tiny("train.also_on=val", run="whole"))
    train(tiny("train.also_on=val", "train.episodes=4", "val.every=4"))
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "checkpoints" / "best.ckpt").unlink()
    assert train(tiny("resume=auto", "train.also_on=val")) is None
    assert train(tiny("resume=auto", "train.also_on=val")) is None  # complete: shows the results
    final = [runs.read_tensors(tmp_path / run / "checkpoints" / "best.ckpt")["state_dict"] for run in ("whole", "run")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_no_program_tests_on_the_classes_that_were_trained_on(tiny, tmp_path):
    train(tiny("train.also_on=val"))
    run, out = tmp_path / "run", f"out={tmp_path / 'evaluated'}"
    with pytest.raises(FewShotError, match=r"split=val: the run was trained on the validation classes"):
        evaluate(compose(f"checkpoint={run}", "split=val", out, name="evaluate"))
    again = evaluate(compose(f"checkpoint={run}", out, name="evaluate"))
    assert again == json.loads((run / "results.json").read_text())["accuracy"]
    # A run that validates cannot start from an encoder that knows its validation classes.
    with pytest.raises(FewShotError, match=r"was trained on \d+ of the val classes"):
        train(tiny(f"encoder.init={run}", run="second"))
    # Neither can a run be resumed with more or fewer classes.
    with pytest.raises(FewShotError, match=r"train\.also_on|trained on different data"):
        train(tiny("resume=auto", "train.episodes=8"))


def test_the_report_tells_the_two_apart(tiny, tmp_path):
    train(tiny(run="runs/b"))
    train(tiny("train.also_on=val", run="runs/a"))
    found = list(find_results([tmp_path / "runs"]).values())
    assert len({json.dumps(settings(result), sort_keys=True) for result in found}) == 2
    methods = {"protonet": {"title": "Prototypical networks", "match": {"choices.method": "protonet"}}}
    tables = {"glyphs": {"title": "Glyphs", "cells": ["5way_1shot"], "methods": methods}}
    config = compose(name="report")
    report(str(tmp_path / "runs"), OmegaConf.create(tables), config.sources, str(tmp_path / "report"), None)
    rows = [row for row in (tmp_path / "report" / "report.md").read_text().splitlines() if row.startswith("| Proto")]
    assert ["and validation classes" in row for row in rows] == [False, True]


@pytest.mark.parametrize("value", ["test", "train", "3"])
def test_other_splits_are_refused(tiny, value):
    with pytest.raises(FewShotError, match=rf"train\.also_on={value} must be null or val"):
        train(tiny(f"train.also_on={value}"))


def test_a_search_needs_validation(cli, tmp_path):
    done = cli(
        "-m",
        "hydra/sweeper=search",
        *TINY,
        "train.also_on=val",
        f"hydra.sweep.dir={tmp_path}",
        "seed=1,2",
        "hydra.sweeper.n_trials=1",
    )
    assert done.returncode != 0
    assert "train.also_on=val leaves no validation accuracy to search by" in done.stdout + done.stderr
