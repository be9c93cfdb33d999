"""A run is resumed and evaluated only on the data that it was trained on."""

import base64
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot.config import compose
from fewshot.data.bank import SPLITS
from fewshot.data.contents import MAX_CHARACTERS, Contents, read_contents, read_names
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.metrics import EpisodeAccuracy
from fewshot.training import train

TINY = ["train.episodes=4", "train.way=3", "way=2", "query=2", "train.query=2", "val.episodes=2", "test.episodes=2"]
TINY += ["encoder.filters=4", "hardware=cpu", "val.every=2", "checkpoint_every=2", "pictures=false"]
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def original(tmp_path_factory, cache_dir):
    """Directories of images, and a run trained on them."""
    root = tmp_path_factory.mktemp("original")
    for split, names in {"train": "abcd", "val": "ef", "test": "ghi"}.items():
        for name in names:
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(5):
                Image.fromarray(RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    train(compose(*settings(root, cache_dir)))
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy of ``original``."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def settings(root, cache_dir, *more):
    data = ["dataset=folder", "dataset.size=16", f"data_dir={root / 'data'}"]
    return [*data, *TINY, f"cache_dir={cache_dir}", f"run_dir={root / 'run'}", *more]


def test_config(root, cache_dir, *more):
    named = [f"checkpoint={root / 'run'}", f"data_dir={root / 'data'}", f"cache_dir={cache_dir}"]
    return compose(*named, f"out={root / 'out'}", *more, name="evaluate")


test_config.__test__ = False  # type: ignore[attr-defined]


def added(data: Path) -> str:
    shutil.copytree(data / "test" / "g", data / "train" / "new")
    next((data / "train" / "new").iterdir()).unlink()
    return r"added: new \(train\)"


def removed(data: Path) -> str:
    shutil.rmtree(data / "train" / "a")
    return r"removed: a \(train\)"


def renamed(data: Path) -> str:
    (data / "test" / "g").rename(data / "test" / "other")
    return r"renamed: g \(test\) to other \(test\)"


def moved(data: Path) -> str:
    (data / "train" / "a").rename(data / "test" / "a")
    return r"in another split: a \(was train, is test\)"


def moved_and_renamed(data: Path) -> str:
    (data / "train" / "a").rename(data / "test" / "other")
    return r"renamed: a \(train\) to other \(test\)"


def other_images(data: Path) -> str:
    Image.new("RGB", (16, 16), "red").save(data / "test" / "h" / "0.png")
    return "different images: h;"


@pytest.mark.parametrize("change", [added, removed, renamed, moved, moved_and_renamed, other_images])
def test_different_data_are_rejected_before_anything_is_trained_or_tested(root, cache_dir, change, monkeypatch, capsys):
    message = change(root / "data")
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*.*")}
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr("pytorch_lightning.Trainer.test", lambda *_, **__: pytest.fail("tested"))
    for more in ([], ["train.episodes=6"], ["test.episodes=3"]):
        with pytest.raises(FewShotError, match=f"run was trained on different data: .*{message}") as caught:
            train(compose(*settings(root, cache_dir, "resume=auto", *more)))
        assert "train again in another directory" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FewShotError, match=rf"{message}.*allow_other_classes=true"):
        evaluate(test_config(root, cache_dir))
    assert "%" not in capsys.readouterr().out and not (root / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in (root / "run").rglob("*.*")} == before


@pytest.mark.parametrize("record", ["checkpoint", "classes.json"])
def test_an_evaluation_may_leave_out_training_classes(root, cache_dir, record, capsys):
    if record == "classes.json":  # checkpoints of an older version do not record it
        for path in (root / "run" / "checkpoints").iterdir():
            checkpoint = torch.load(path, weights_only=True)
            torch.save({key: value for key, value in checkpoint.items() if key != "data"}, path)
    moved(root / "data")
    (root / "data" / "val" / "e").rename(root / "data" / "test" / "e")
    shutil.copytree(root / "data" / "train" / "b", root / "data" / "val" / "b2")
    evaluate(test_config(root, cache_dir, "allow_other_classes=true"))
    results = json.loads((root / "out" / "results.json").read_text())
    assert results["left_out_classes"] == ["a", "e"] and set(results["classes"]) <= set("ghi")
    assert results["data"]["classes"]["test"] == 3
    assert "left out 2 test classes that were trained on: a, e" in capsys.readouterr().out


def test_renamed_classes_are_recognized_by_their_images(root, cache_dir):
    moved_and_renamed(root / "data")
    evaluate(test_config(root, cache_dir, "allow_other_classes=true"))
    assert json.loads((root / "out" / "results.json").read_text())["left_out_classes"] == ["other"]


@pytest.mark.parametrize(
    "changed",
    ["dataset.source.split_seed=1", "dataset.source.val=0.3", "dataset.normalise=plain", "dataset.channels=1"],
)
def test_settings_of_the_data_must_be_those_of_the_run(root, cache_dir, changed):
    key, _, value = changed.partition("=")
    with pytest.raises(FewShotError, match=rf"run with different settings: .*{re.escape(key)}={value} \(the run has "):
        train(compose(*settings(root, cache_dir, "resume=auto", changed)))


def test_the_same_data_in_another_directory_are_accepted(root, cache_dir, capsys):
    (root / "data").rename(root / "moved")
    train(compose(*settings(root, cache_dir, "resume=auto", f"data_dir={root / 'moved'}")))
    assert "%" in capsys.readouterr().out
    train(compose(*settings(root, cache_dir, "resume=auto", f"data_dir={root / 'moved'}", "test.episodes=3")))
    config = json.loads((root / "run" / "results.json").read_text())["config"]
    assert config["data_dir"] == config["dataset"]["source"]["data_dir"] == str(root / "moved")


def test_resume_by_directory_reads_data_dir_from_the_command_line(root, cache_dir, cli):
    moved = root / "moved"
    shutil.copytree(root / "data", moved)
    done = cli(f"resume={root / 'run'}", f"data_dir={moved}", f"cache_dir={cache_dir}", "test.episodes=3")
    assert done.returncode == 0, done.stderr
    config = json.loads((root / "run" / "results.json").read_text())["config"]
    assert config["data_dir"] == config["dataset"]["source"]["data_dir"] == str(moved)
    removed(moved)
    done = cli(f"resume={root / 'run'}", f"data_dir={moved}", f"cache_dir={cache_dir}", "test.episodes=4")
    assert done.returncode == 1 and "removed: a (train)" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_different_precision_is_reported_and_in_the_results(root, cache_dir, capsys):
    again = settings(root, cache_dir, "resume=auto", "hardware.precision=64-true")
    train(compose(*again))
    assert "the run was completed with hardware.precision=32-true, not 64-true" in capsys.readouterr().err
    train(compose(*again, "train.episodes=6"))
    assert "hardware.precision=32-true so far, and continues with 64-true" in capsys.readouterr().err
    results = json.loads((root / "run" / "results.json").read_text())
    assert results["precisions"] == ["32-true from 0", "64-true from 4"] and results["precision"] == "64-true"


@pytest.mark.parametrize("fault", ["deleted", "broken", "of another run"])
def test_missing_or_broken_best_weights_are_reported_before_training(root, cache_dir, fault, monkeypatch):
    path, last = root / "run" / "checkpoints" / "best.ckpt", root / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    validations = checkpoint["callbacks"]["Record"]["validations"]
    for number, accuracy in enumerate((0.9, 0.5)):
        validations[number]["accuracy"] = accuracy
    torch.save(checkpoint, last)
    if fault == "deleted":
        path.unlink()
    elif fault == "broken":
        path.write_bytes(b"x")
    config = compose(*settings(root, cache_dir, "resume=auto", "train.episodes=6"))
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *_, **__: pytest.fail("trained"))
    message = r"is missing, which holds .* \(after 2 training" if fault == "deleted" else "is broken, or from another"
    with pytest.raises(FewShotError, match=rf"best\.ckpt {message}"):
        train(config)


def test_the_best_weights_are_restored_if_the_last_are_the_best(root, cache_dir, capsys):
    path, last = root / "run" / "checkpoints" / "best.ckpt", root / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["callbacks"]["Record"]["validations"][0]["accuracy"] = 0.0
    checkpoint["callbacks"]["Record"]["validations"][1]["accuracy"] = 0.9
    torch.save(checkpoint, last)
    path.unlink()
    train(compose(*settings(root, cache_dir, "resume=auto", "test.episodes=3")))
    assert "was missing; the last checkpoint holds the same weights" in capsys.readouterr().out and path.exists()


def test_a_kill_between_the_best_and_the_last_checkpoint_does_not_stop_a_resume(root, cache_dir, monkeypatch):
    compute = EpisodeAccuracy.compute  # the validation that comes again is the best one, again
    monkeypatch.setattr(EpisodeAccuracy, "compute", lambda self: compute(self)._replace(accuracy=0.99))
    path, last = root / "run" / "checkpoints" / "best.ckpt", root / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    validations = checkpoint["callbacks"]["Record"]["validations"]
    validations.append({**validations[-1], "trained_episodes": 6, "accuracy": 0.99})
    checkpoint["EpisodeDataModule"]["trained"] = 6
    torch.save(checkpoint, path)
    train(compose(*settings(root, cache_dir, "resume=auto", "train.episodes=6")))
    results = json.loads((root / "run" / "results.json").read_text())
    assert [point["trained_episodes"] for point in results["validations"]] == [2, 4, 6]


def test_results_without_their_checkpoint_are_not_overwritten(root, cache_dir):
    (root / "run" / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(FewShotError, match=r"contains the results of a run, but not its checkpoints/last\.ckpt"):
        train(compose(*settings(root, cache_dir, "resume=auto")))


def packed(text: bytes) -> str:
    return base64.b64encode(zlib.compress(text)).decode()


def test_a_record_of_the_data_is_short_and_equals_that_of_earlier_versions():
    names = {split: {f"{split}/character{n}": f"{n:032x}"[::-1] for n in range(500)} for split in SPLITS}
    earlier = json.dumps({"splits": names, "images_sha256": "a" * 64})
    now = read_contents(earlier)
    assert read_contents(now.pack()) == now
    assert list(now.splits["test"].items())[1] == ("test/character1", "100000000000")
    assert 8 * len(now.pack()) < len(earlier)
    unknown = Contents({split: dict.fromkeys(names[split]) for split in SPLITS})
    assert read_contents(unknown.pack()) == unknown


@pytest.mark.parametrize(
    "text",
    [
        None,
        3,
        "",
        "{",
        "[]",
        "{}",
        '{"splits": {}}',
        '{"splits": {"train": {"a": 1}, "val": {}, "test": {}}}',
        "[" * 9999,
        "é",
        "c29tZXRoaW5n",
        packed(b"[]")[:-8],
        packed(b"\xff{}"),
        packed(b'{"splits": {}}'),
        packed(b" " * (MAX_CHARACTERS + 1)),
    ],
)
def test_a_record_of_the_data_is_plain_text_or_rejected(text):
    with pytest.raises(ValueError, match=r"record of the data|Expecting|property name|base64|ASCII|padding|decode"):
        read_contents(text)
    with pytest.raises(ValueError, match="does not list the classes"):
        read_names(text)
