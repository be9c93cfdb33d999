"""A checkpoint tested again."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import hardware
from fewshot.config import compose
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate as run_evaluation
from fewshot.evaluation import evaluate_split, task_of
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.metrics import paired_difference
from fewshot.results import by_settings, own_validation, read_results, settings
from fewshot.trained import load_trained
from fewshot.training import train

TINY = ["train.episodes=2", "train.way=5", "query=4", "encoder.filters=8", "val.episodes=3", "test.episodes=23"]
METHODS = {
    "protonet": ["method=protonet", "seed=1"],
    "matching_fce": ["method=matching_fce", "hardware.precision=64-true"],
    "maml": ["method=maml", "train.meta_batch=2", "hardware.precision=bf16-mixed"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    """Trains each method once, a little; returns the directory of its run."""
    runs = {}

    def evaluate_run(method: str, *more: str):
        key = (method, *more)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp(method)
            train(compose(*METHODS[method], *TINY, *more, f"run_dir={runs[key]}", f"cache_dir={cache_dir}"))
        return runs[key]

    return evaluate_run


@pytest.fixture
def evaluate(cache_dir, tmp_path):
    """Runs the evaluation; returns what it wrote."""

    def act(run_dir, *overrides: str, written: str = "results.json"):
        out = tmp_path / "out"
        run_evaluation(
            compose(f"checkpoint={run_dir}", f"out={out}", f"cache_dir={cache_dir}", *overrides, name="evaluate")
        )
        return json.loads((out / written).read_text())

    return act


@pytest.mark.parametrize("method", METHODS)
def test_as_the_run_was_tested_the_accuracy_is_the_same_to_the_last_digit(run, evaluate, tmp_path, method):
    trained = json.loads((run(method) / "results.json").read_text())
    tested = evaluate(run(method), f"hardware.precision={trained['precision']}")
    same = ("accuracy", "ci95", "episodes", "dataset", "method", "distance", "encoder", "way", "shot", "query", "seed")
    assert {key: tested[key] for key in same} == {key: trained[key] for key in same}
    assert tested["validations"] == trained["validations"] and tested["val_accuracy"] == trained["val_accuracy"]
    found = read_results([str(tmp_path / "out"), str(run(method))])
    assert len(found) == 2
    assert by_settings(found) == [[trained]]  # the report counts the run's own test, and not the same once more
    (again,) = by_settings([tested])[0]
    assert settings(again) == settings(trained) and (again["weights"], again["split"]) == ("best", "test")
    assert Image.open(tmp_path / "out" / "confusion.png").size[0] > 300


@pytest.mark.parametrize("flags", ["avx2", "avx512_bf16"])
def test_what_the_processor_only_emulates_is_computed_in_float32(run, evaluate, monkeypatch, flags):
    monkeypatch.setattr(hardware, "_cpu_info", lambda _: flags)
    tested = evaluate(run("maml"), "hardware=cpu", "episodes=3")
    assert tested["precision"] == ("bf16-mixed" if flags == "avx512_bf16" else "32-true")


def test_another_task_and_another_split(run, evaluate):
    config = ["way=3", "shot=2", "query=2", "episodes=5", "eval_seed=7", "hardware.precision=bf16-mixed"]
    tested = evaluate(run("maml"), *config)
    trained = json.loads((run("maml") / "results.json").read_text())
    # A checkpoint's configuration names no place to write to.
    assert tested["run_config"] == trained["config"] | {"run_dir": None, "logger": None}
    asked = {"test.way": 3, "test.shot": 2, "test.query": 2, "test.episodes": 5, "test.eval_seed": 7}
    before = settings(trained)
    assert {key: value for key, value in settings(tested).items() if value != before.get(key)} == asked
    assert [tested[key] for key in ("way", "shot", "query", "episodes")] == [3, 2, 2, 5]
    assert tested["config"]["eval_seed"] == 7 and tested["overrides"][-1] == "test.episodes=5"
    assert evaluate(run("protonet"), "way=30", "episodes=2")["way"] == 30
    # The validation of the run, once more.
    best = max(validation["accuracy"] for validation in tested["validations"])
    validated = evaluate(run("maml"), "split=val", "episodes=3", config[-1], written="results_val.json")
    assert validated["accuracy"] == best and validated["split"] == "val"
    listed = json.loads((run("maml") / "classes.json").read_text())
    assert set(validated["classes"]) <= set(listed["val"]) and set(tested["classes"]) <= set(listed["test"])


def test_the_accuracies_of_the_classes_average_to_the_accuracy(run, evaluate):
    tested = evaluate(run("protonet"), "episodes=200")
    assert np.mean(list(tested["classes"].values())) == pytest.approx(tested["accuracy"], abs=0.03)


def test_two_checkpoints_meet_the_same_episodes(run, evaluate, capsys):
    alone = evaluate(run("protonet"), "way=4")
    other = evaluate(run("matching_fce"), "way=4", "hardware.precision=32-true")
    both = evaluate(run("protonet"), f"against={run('matching_fce')}", "way=4", "hardware.precision=32-true")
    assert (both["accuracy"], both["against"]["accuracy"]) == (alone["accuracy"], other["accuracy"])
    assert both["difference"]["mean"] == pytest.approx(alone["accuracy"] - other["accuracy"])
    assert both["difference"]["episodes"] == 23
    assert "first - second, episode by episode" in capsys.readouterr().out
    same = evaluate(run("protonet"), f"against={run('protonet')}")["difference"]
    assert (same["mean"], same["ci95"]) == (0, 0)


def test_a_paired_difference_is_that_of_the_episodes():
    right, others = np.array([5, 9, 7, 10]), np.array([4, 9, 5, 9])
    found = paired_difference(right, others, 10)
    assert found.accuracy == pytest.approx(0.1) and found.episodes == 4
    assert found.ci95 == pytest.approx(1.96 * np.std([0.1, 0, 0.2, 0.1], ddof=1) / 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=null"], "nothing to evaluate"),
        (["split=rest"], "split=rest must be train, val or test"),
        (["way=1"], "way=1 must be a whole number of at least 2"),
        (["episodes=1"], "test.episodes=1 must be a whole number of at least 2"),
        (["way=9999"], "way=9999 is more than the"),
        (["split=train", "way=9999"], "^way=9999 is more than the .* of the train split; choose way="),
        (["against=5"], "against=5 must be a path or null"),
        (["cache_dir=null"], "cache_dir=None must be a path"),
        (["pictured=none"], "pictured=none must be a whole number"),
        (["hardware=cpu", "hardware.devices=2"], "evaluation uses one device"),
    ],
)
def test_a_mistake_is_reported_in_one_line(run, evaluate, overrides, message):
    with pytest.raises(FewShotError) as caught:
        evaluate(run("protonet"), *overrides)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_it_does_not_write_over_a_run(tmp_path):
    for path in (tmp_path / "results.json", tmp_path / "checkpoints" / "last.ckpt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    with pytest.raises(FewShotError, match=f"out={tmp_path} contains a run"):
        run_evaluation(compose(f"checkpoint={tmp_path}", f"out={tmp_path}", name="evaluate"))
    assert (tmp_path / "results.json").read_text() == "{}"


def test_runs_on_other_classes_are_not_compared(run, evaluate):
    other = run("protonet", "dataset.source.seed=3")
    with pytest.raises(FewShotError, match=r"cannot be compared: .*\(dataset\.source\.seed\)"):
        evaluate(run("protonet"), f"against={other}")


def test_the_command_tests(cli, run, tmp_path):
    message = cli(f"checkpoint={run('protonet')}", "episodes=2", f"out={tmp_path / 'out'}", script="evaluate.py")
    assert message.returncode == 0, message.stderr
    assert "lowest: " in message.stdout and (tmp_path / "out" / "results.json").exists()
    wrong = cli(f"checkpoint={run('protonet')}", "way=five", script="evaluate.py")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr and "five" in wrong.stderr
    assert torch.load(run("protonet") / "checkpoints" / "best.ckpt", weights_only=True)


def test_another_method_on_the_encoder_of_a_checkpoint(run, evaluate, tmp_path):
    own = evaluate(run("protonet"))
    same = evaluate(run("protonet"), "method=protonet")
    assert same["accuracy"] == own["accuracy"] and same["overrides"][-1] == "method=protonet"
    other = evaluate(run("protonet"), "method=matching", "distance=cosine", f"against={run('protonet')}")
    assert (other["method"], other["distance"]) == ("matching", "cosine") and other["accuracy"] != own["accuracy"]
    assert other["against"]["accuracy"] == own["accuracy"]
    assert other["config"]["method"]["_target_"] != other["run_config"]["method"]["_target_"]
    with pytest.raises(FewShotError, match="none of the 1 results"):  # it is not a result of the run
        read_results([str(tmp_path / "out")])
    # At one shot, the nearest prototype and the most similar sample are the same.
    assert evaluate(run("protonet"), "method=matching")["accuracy"] == own["accuracy"]


@pytest.fixture
def letters(tmp_path):
    """Twelve classes of images in folders, three of them to test."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for label in range(count):
            for number in range(5):
                path = tmp_path / "letters" / split / f"{split}{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (30, 40), dtype=np.uint8)).save(path)
    return tmp_path / "letters"


def test_a_checkpoint_is_tested_on_another_data_set(run, evaluate, letters, tmp_path, capsys):
    data = ["dataset=folder", f"data_dir={letters}"]
    tested = evaluate(run("protonet"), *data, "way=3", "episodes=3")
    assert (tested["dataset"], tested["trained_on"]) == ("folder", "glyphs")
    assert tested["config"]["dataset"]["source"]["channels"] == tested["config"]["dataset"]["channels"] == 1
    assert tested["config"]["dataset"]["size"] == 28 and tested["run_config"]["choices"]["dataset"] == "glyphs"
    assert tested["data"]["classes"]["test"] == 3 and not tested["left_out_classes"]
    with pytest.raises(FewShotError, match="none of the 1 results"):
        read_results([str(tmp_path / "out")])
    assert "an evaluation on data other than the training's, glyphs" in capsys.readouterr().err
    # Another split of its own data set: classes that it was trained on are left out.
    again = evaluate(run("protonet", "dataset.source.samples=9", "seed=3"), "dataset=glyphs", "episodes=3")
    assert not again["left_out_classes"] and again["trained_on"] == "glyphs"
    both = evaluate(run("protonet"), f"against={run('matching_fce')}", *data, "way=3", "episodes=3")
    assert both["against"]["episodes"] == 3


def test_classes_of_another_data_set_that_were_trained_on_are_left_out(evaluate, letters, cache_dir, tmp_path):
    (letters / "test" / "test9").mkdir()
    for path in (letters / "train" / "train0").iterdir():  # the same images under another name
        (letters / "test" / "test9" / path.name).write_bytes(path.read_bytes())
    data = ["dataset=folder", "dataset.channels=1", "dataset.size=28", f"data_dir={letters}", "query=3", "way=3"]
    shutil.copytree(letters, tmp_path / "first" / "letters")
    shutil.rmtree(tmp_path / "first" / "letters" / "test" / "test9")
    first = [
        *data[:3],
        f"data_dir={tmp_path / 'first' / 'letters'}",
        *data[4:],
        "train.way=3",
        f"cache_dir={cache_dir}",
    ]
    little = ["train.episodes=2", "val.episodes=2", "test.episodes=2", f"run_dir={tmp_path / 'run'}"]
    train(compose(*first, *little, "train.query=3"))
    tested = evaluate(tmp_path / "run", "dataset=folder", f"data_dir={letters}", "episodes=3")
    assert tested["left_out_classes"] == ["test9"]


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("protonet", ["encoder=resnet12"], "encoder=resnet12: a checkpoint decides the dataset and the encoder"),
        ("protonet", ["encoder.filters=3"], "a checkpoint decides"),
        ("protonet", ["dataset.size=9"], "to test on another one: dataset=cifar_fs"),
        ("protonet", ["dataset=folder", "dataset.size=9"], r"was trained with dataset\.size=28, and keeps it"),
        (
            "protonet",
            ["dataset=miniimagenet"],
            "dataset=miniimagenet: its images have 3 channels, and the encoder takes 1",
        ),
        ("protonet", ["distance=cosine"], "distance=cosine: name the method"),
        ("protonet", ["method=maml"], "method=maml has untrained weights: train it with encoder.init"),
        *(
            ("protonet", [f"method={name}"], f"method={name} has untrained weights")
            for name in ("matching_fce", "feat", "relation", "r2d2", "metaoptnet_ridge", "meta_baseline", "classifier")
        ),
        ("maml", ["method=protonet"], "normalises each batch by its own statistics"),
    ],
)
def test_a_method_that_does_not_go_with_a_checkpoint_is_refused(run, evaluate, method, overrides, message):
    with pytest.raises(FewShotError, match=message):
        evaluate(run(method), *overrides)


def test_an_encoder_that_needs_no_training(tmp_path, cache_dir, capsys):
    choice = ["encoder=pretrained", "encoder.weights=null", "method=protonet", "dataset.size=32", "episodes=3"]
    run_evaluation(compose(*choice, f"out={tmp_path}", f"cache_dir={cache_dir}", "way=3", "query=2", name="evaluate"))
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["dataset"], result["method"], result["encoder"]) == ("glyphs", "protonet", "pretrained")
    assert (result["checkpoint"], result["weights"], result["validations"]) == ("encoder=pretrained", "untrained", [])
    assert (result["way"], result["query"], result["episodes"]) == (3, 2, 3)
    shown = capsys.readouterr().err
    assert "encoder=pretrained has random weights" in shown and "may be among them" not in shown
    with pytest.raises(FewShotError):
        read_results([str(tmp_path)])
    assert "skipped" in (shown := capsys.readouterr().err) and "an evaluation without training" in shown


@pytest.mark.parametrize("choice", [["encoder=conv4"], ["encoder=pretrained", "encoder.weights=null", "method=maml"]])
def test_untrained_weights_are_not_evaluated(choice, tmp_path):
    with pytest.raises(FewShotError, match="has untrained weights"):
        run_evaluation(compose(*choice, f"out={tmp_path / 'out'}", name="evaluate"))
    assert not list(tmp_path.iterdir())


def test_a_sweep_resumes_without_the_jobs_that_the_same_command_finished(run, cache_dir, tmp_path, capsys):
    base = [f"checkpoint={run('protonet')}", f"cache_dir={cache_dir}", f"out={tmp_path}", "hardware=cpu"]

    def evaluated(*overrides):
        accuracy = run_evaluation(compose(*base, *overrides, name="evaluate"))
        return accuracy, "kept, because it is finished" in capsys.readouterr().out

    first, kept = evaluated("episodes=4", "resume=auto")
    assert not kept
    assert evaluated("episodes=4", "resume=auto") == (first, True)
    assert evaluated("episodes=4") == (first, False)  # without resume, it is measured again
    assert not evaluated("episodes=6", "resume=auto")[1]  # another command
    (tmp_path / "results.json").write_text("{")
    assert not evaluated("episodes=6", "resume=auto")[1]
    with pytest.raises(FewShotError, match="resume=RUN must be auto"):
        evaluated("resume=RUN")


def test_a_validation_counts_only_for_what_was_validated(run, evaluate):
    assert own_validation(evaluate(run("protonet")))["accuracy"] > 0
    for other in ("method=simpleshot", "distance=cosine method=protonet", "way=4", "shot=2", "mirror=true"):
        assert own_validation(evaluate(run("protonet"), *other.split())) is None


def test_a_precision_that_only_a_gpu_has_is_refused(run, evaluate):
    with pytest.raises(FewShotError, match=r"hardware\.precision=16-mixed needs a GPU"):
        evaluate(run("protonet"), "hardware=cpu", "hardware.precision=16-mixed")


class Power(PrototypicalNetwork):
    """A method whose embeddings depend on a setting of its own."""

    def __init__(self, encoder, power):
        super().__init__(encoder)
        self.power = power

    def embed_images(self, images):
        return self.encoder(images).abs() ** self.power


def test_embeddings_that_depend_on_a_setting_of_the_method_are_kept_apart(run, tmp_path, cache_dir):
    def accuracy(power, cache):
        trained = load_trained(str(run("protonet")))
        config = task_of(
            trained.config, compose(f"cache_dir={cache}", f"out={tmp_path}", "hardware=cpu", name="evaluate")
        )
        config.method.power = power
        method = Power(trained.method.encoder, power).eval()
        return evaluate_split(replace(trained, method=method), config).estimate.accuracy

    expected = []
    for power in (1, 8):
        shutil.copytree(cache_dir, tmp_path / str(power), ignore=shutil.ignore_patterns("embeddings"))
        expected.append(accuracy(power, tmp_path / str(power)))
    assert expected[0] != expected[1]
    shutil.copytree(cache_dir, tmp_path / "shared", ignore=shutil.ignore_patterns("embeddings"))
    assert [accuracy(power, tmp_path / "shared") for power in (1, 8, 1)] == [*expected, expected[0]]
