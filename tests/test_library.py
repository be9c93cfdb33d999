"""The project as a library, with ``import fewshot`` only."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from torch import nn

import fewshot
from conftest import nothing_touched
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.encoders.conv4 import Conv4
from fewshot.errors import FewShotError
from fewshot.predictor import make_predictor

rng = np.random.default_rng(0)


@pytest.fixture
def examples():
    """Bright and dark images of several sizes and types."""
    dark = rng.integers(0, 60, (40, 30), dtype=np.uint8)
    bright = rng.integers(180, 255, (28, 28, 1), dtype=np.uint8)
    return [dark, Image.fromarray(dark), bright, bright], ["dark", "dark", "bright", "bright"]


def test_import_is_lazy_and_all_names_exist():
    look = "import sys, fewshot; assert 'torch' not in sys.modules; print(*dir(fewshot))"
    names = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    assert set(fewshot.__all__) <= set(names)
    assert all(getattr(fewshot, name) is not None for name in fewshot.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'tain'"):
        _ = fewshot.tain


def test_train_and_load(tmp_path, monkeypatch, cache_dir):
    monkeypatch.setattr("fewshot.directories.ROOT", tmp_path)
    small = {"train": {"episodes": 2, "way": 3}, "val": {"episodes": 2}, "test": {"episodes": 2}}
    run = fewshot.train("query=2", method="protonet", encoder={"filters": 4}, cache_dir=cache_dir, **small)
    assert run.parents[1] == tmp_path / "outputs" and run.name.endswith("_protonet_glyphs")
    assert json.loads((run / "results.json").read_text())["query"] == 2
    assert isinstance(fewshot.load(run).method, fewshot.PrototypicalNetwork)


def test_composing_does_not_disturb_the_callers_hydra(monkeypatch):
    outer = object()
    monkeypatch.setattr(HydraConfig.instance(), "cfg", outer)
    assert fewshot.compose("way=3").way == 3
    assert HydraConfig.instance().cfg is outer


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"way": 5, "train": {"episodes": 9}}, ["way=5", "train.episodes=9"]),
        (
            {"data_dir": "a b,{=}'", "resume": None, "pictures": False},
            ["data_dir='a b,{=}\\''", "resume=null", "pictures=false"],
        ),
        ({"trust": ["a", "b"]}, ["trust=['a','b']"]),
    ],
)
def test_settings_are_overrides(settings, overrides):
    assert fewshot.config.as_overrides(settings) == overrides
    config = fewshot.compose(*overrides)
    for key, value in settings.items():
        assert config[key]["episodes"] == 9 if isinstance(value, dict) else config[key] == value


def test_the_data_module_needs_only_a_name(cache_dir):
    data = fewshot.EpisodeDataModule("glyphs", way=3, query=2, train={"episodes": 2}, cache_dir=str(cache_dir))
    assert data.train_episode == {"way": 3, "shot": 1, "query": 2, "seed": 0} and data.train_episodes == 2
    method = fewshot.PrototypicalNetwork(Conv4(channels=1, size=28, filters=4))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=1, enable_checkpointing=False, limit_val_batches=1, **quiet).fit(method, data)
    assert data.trained == 2
    with pytest.raises(Exception, match="nowhere"):
        EpisodeDataModule("nowhere")


# MAML's batch norm sees the queries of a batch together.
@pytest.mark.parametrize(("name", "batch"), [("protonet", 3), ("maml", 64)])
def test_the_classifier_agrees_with_predict(run, examples, name, batch, tmp_path):
    images, labels = examples
    classifier = fewshot.FewShotClassifier(run(name), hardware="cpu", batch=batch).fit(images, labels)
    assert classifier.classes_.tolist() == ["bright", "dark"]
    predictor = make_predictor(fewshot.compose(f"checkpoint={run(name)}", "hardware=cpu", name="predict"))
    pixels = list(classifier.support_)
    assert classifier.labels_.tolist() == [0, 0, 1, 1]
    logits = predictor.learn({"bright": pixels[:2], "dark": pixels[2:]})([*pixels[2:], *pixels[:2]])
    np.testing.assert_allclose(classifier.decision_function(images), logits[:, 1] - logits[:, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(classifier.predict_proba(images).sum(axis=1), 1, rtol=1e-5)
    assert classifier.score(images, labels) == np.mean(classifier.predict(images) == labels)
    assert classifier.predict([]).shape == (0,)

    Image.fromarray(images[0]).save(tmp_path / "dark.png")
    np.testing.assert_allclose(
        classifier.decision_function([tmp_path / "dark.png"]), classifier.decision_function(images[:1]), rtol=1e-5
    )


def test_each_example_has_its_label_whatever_their_order():
    grey = [30, 200, 10, 220, 20]
    images = [np.full((8, 8), value, np.uint8) for value in grey]
    labels = ["dark" if value < 100 else "bright" for value in grey]
    encoder = nn.Flatten()
    classifier = fewshot.FewShotClassifier(encoder, size=8, channels=1, normalise="plain", hardware="cpu")
    classifier.fit(images, labels)
    assert classifier.classes_[classifier.labels_].tolist() == ["bright"] * 2 + ["dark"] * 3
    assert [int(example.max()) for example in classifier.support_] == [200, 220, 30, 10, 20]
    assert classifier.predict(list(classifier.support_)).tolist() == ["bright"] * 2 + ["dark"] * 3


def test_a_saved_classifier_gives_the_same_answers_and_contains_no_paths(run, examples, tmp_path):
    images, labels = examples
    classifier = fewshot.FewShotClassifier(run("protonet"), hardware="cpu").fit(images, labels)
    file = tmp_path / "mine.safetensors"
    classifier.save(file)
    assert str(run("protonet")).encode() not in file.read_bytes()
    with nothing_touched():
        loaded = fewshot.FewShotClassifier.load(file, hardware="cpu")
    assert loaded.classes_.tolist() == classifier.classes_.tolist()
    np.testing.assert_array_equal(loaded.decision_function(images), classifier.decision_function(images))
    again = fewshot.FewShotClassifier(file, hardware="cpu").fit(images, [3, 3, 1, 1])
    again.save(tmp_path / "numbers.safetensors")
    numbers = fewshot.FewShotClassifier.load(tmp_path / "numbers.safetensors").predict(images)
    assert numbers.dtype.kind == "i" and set(numbers) <= {1, 3}


def test_any_encoder_classifies(examples):
    images, labels = examples
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = fewshot.FewShotClassifier(encoder, size=28, channels=1, normalise="range", hardware="cpu")
    assert clone(classifier).size == 28  # as scikit-learn does to try settings
    assert classifier.fit(images, labels).predict(images).tolist() == labels
    with pytest.raises(FewShotError, match="a classifier made from a module cannot be saved"):
        classifier.save("x")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([np.zeros((4, 4))], ["a"], r"array of float64 \[4, 4\]; give uint8"),
        ([np.zeros((4, 4, 2), np.uint8)], ["a"], r"uint8 \[4, 4, 2\]"),
        ([np.zeros((0, 4), np.uint8)], ["a"], r"no pixels: \[0, 4\]"),
        ([np.zeros((4, 4), np.uint8)] * 2, ["a", "a"], "at least two classes"),
        ([np.zeros((4, 4), np.uint8)] * 2, ["a"], r"labels have shape \[1\] for 2 images"),
        ([], [], "at least two classes"),
        (["nowhere.png"], ["a"], "cannot read the image nowhere.png"),
        ("nowhere.png", ["a"], r"is a single image; give a list of them"),
        ([np.zeros((1, 20_000), np.uint8)], ["a"], "it is a strip of 20,000x1 pixels, .*; remove it"),
        ([np.zeros((4, 4), np.uint8)] * 2, ["a", None], "labels are of different kinds"),
    ],
)
def test_invalid_examples_are_reported(run, images, labels, message):
    with pytest.raises(FewShotError, match=message):
        fewshot.FewShotClassifier(run("protonet"), hardware="cpu").fit(images, labels)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": 4}, "^channels=4 must be 1 or 3$"),
        ({"size": 0}, "^size=0 must be a whole number of at least 1$"),
        ({"normalise": "none"}, "^normalise=none must be range, standardise or plain$"),
    ],
)
def test_a_wrong_image_format_is_not_blamed_on_the_images(setting, message):
    images = [np.full((4, 4), value, np.uint8) for value in (0, 255)]
    with pytest.raises(FewShotError, match=message):
        fewshot.FewShotClassifier(nn.Flatten(), hardware="cpu", **setting).fit(images, ["a", "b"])


def test_images_that_mislead_are_warned_of(run, examples):
    images, labels = examples
    classifier = fewshot.FewShotClassifier(run("protonet"), hardware="cpu")
    with pytest.warns(UserWarning, match="the same image is in the classes .*, so they cannot be distinguished"):
        classifier.fit([images[labels.index(labels[-1])], *images], [labels[0], *labels])
    photo = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match="2 of the 2 queries look like photos, but this network knows letters"):
        classifier.predict([photo, photo])


def test_unfitted_classifiers_and_missing_models_are_reported(run, tmp_path):
    with pytest.raises(NotFittedError):
        fewshot.FewShotClassifier(run("protonet")).predict([])
    with pytest.raises(NotFittedError):
        fewshot.FewShotClassifier(run("protonet")).save(tmp_path / "x")
    with pytest.raises(FewShotError, match="nowhere"):
        fewshot.FewShotClassifier(tmp_path / "nowhere").fit([], [])


def test_a_broken_or_hostile_file_is_rejected(run, examples, tmp_path):
    file = tmp_path / "mine.safetensors"
    fewshot.FewShotClassifier(run("protonet"), hardware="cpu").fit(*examples).save(file)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        content = json.loads(opened.metadata()["fewshot"])
    del content["sha256"]  # whoever means harm writes a new one, or none

    def rejected(message, tensors=tensors, **changes):
        save_file(tensors, file, {"fewshot": json.dumps(content | changes)})
        with nothing_touched(), pytest.raises(FewShotError, match=message):
            fewshot.FewShotClassifier.load(file, hardware="cpu")

    rejected("has format 2, and this version reads 1", format=2)
    rejected("does not say what its weights are", format=0)
    rejected("do not fit its classes", classes=["a"])
    rejected("do not fit its classes", classes=["a", "a"])
    rejected("do not fit its classes", classes=["a", [1]])
    rejected("do not fit its classes", tensors | {"labels": tensors["labels"] + 1})
    rejected("do not fit its classes", tensors | {"examples": tensors["examples"][:, 1:].contiguous()})
    rejected("is broken: its configuration has .*HOME.*placeholder", config="${oc.env:HOME}")
    rejected("is broken: its configuration is not a mapping", config="text")
    method = content["config"]["method"]
    rejected("its method is os.system", config=content["config"] | {"method": {**method, "_target_": "os.system"}})
    rejected(
        "its method is mine.Net; .*trust=mine",
        config=content["config"] | {"method": {**method, "_target_": "mine.Net"}},
    )
    weight = next(name for name in tensors if name.startswith("weights.") and name.endswith("weight"))
    rejected("do not fit the method", {name: value for name, value in tensors.items() if name != weight})
    rejected("is not finite", tensors | {weight: torch.full_like(tensors[weight], torch.nan)})
    for contents in (b"", b"\x80\x04.", pickle.dumps([1]), file.read_bytes()[:-9]):
        file.write_bytes(contents)
        with pytest.raises(FewShotError, match="is broken, or holds no weights saved by this program"):
            fewshot.FewShotClassifier.load(file)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0, float("nan"), 1.0], r"the label of image 2 is missing \(nan\)"),
        (["a", "a", 1, 1], "labels are of different kinds"),
        ([None, "a", "b", "b"], "labels are of different kinds"),
    ],
)
def test_labels_that_are_missing_or_mixed_are_refused(examples, labels, message):
    classifier = fewshot.FewShotClassifier(nn.Flatten(), size=28, channels=1, hardware="cpu")
    with pytest.raises(FewShotError, match=message):
        classifier.fit(examples[0], labels)
    assert not hasattr(classifier, "support_")


def test_what_is_no_list_of_images_is_refused(examples):
    images, labels = examples
    classifier = fewshot.FewShotClassifier(nn.Flatten(), size=28, channels=1, hardware="cpu").fit(images, labels)
    for one in (images[0], np.zeros((8, 9, 3), np.uint8), np.zeros((8, 9, 4), np.uint8)):
        with pytest.raises(FewShotError, match=r"a single image; give a list of them"):
            classifier.predict(one)
    assert len(classifier.predict(np.zeros((5, 28, 28), np.uint8))) == 5
    with pytest.raises(FewShotError, match=r"a table; give one column"):
        classifier.predict({"path": images})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch": 0}, "batch=0 must be a whole number of at least 1"),
        ({"batch": "4"}, "batch=4 must be"),
        ({"mirror": "yes"}, "mirror=yes must be true or false"),
        ({"hardware": "gpuu"}, "hardware=gpuu is not an option; choose auto, cpu"),
        ({"hardware": "cpu hardware.precision=3"}, "is not an option"),
    ],
)
def test_settings_of_the_classifier_are_checked(examples, setting, message):
    given = {"size": 28, "channels": 1, "hardware": "cpu"} | setting
    with pytest.raises(FewShotError, match=message):
        fewshot.FewShotClassifier(nn.Flatten(), **given).fit(*examples)


@pytest.mark.parametrize("name", ["protonet", "maml", "taught", "module"])
def test_a_fitted_classifier_is_pickled_without_its_network(run, examples, tmp_path, name):
    images, labels = examples
    made = nn.Flatten() if name == "module" else run("protonet" if name == "taught" else name)
    settings = {"size": 28, "channels": 1} if name == "module" else {}
    fitted = fewshot.FewShotClassifier(made, hardware="cpu", **settings).fit(images, labels)
    if name == "taught":
        fitted.save(tmp_path / "taught.fewshot")
        fitted = fewshot.FewShotClassifier.load(tmp_path / "taught.fewshot", hardware="cpu")
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_allclose(again.predict_proba(images), fitted.predict_proba(images), rtol=1e-5)
    assert again.classes_.tolist() == fitted.classes_.tolist()
    assert pickle.loads(pickle.dumps(clone(fitted))).get_params()["hardware"] == "cpu"
    if name == "protonet":
        other = tmp_path / "run"
        shutil.copytree(run("protonet"), other)
        moved = pickle.dumps(fewshot.FewShotClassifier(other, hardware="cpu").fit(images, labels))
        shutil.copy(run("maml") / "checkpoints" / "best.ckpt", other / "checkpoints" / "best.ckpt")
        with pytest.raises(FewShotError, match="its weights differ from those it was fitted with"):
            pickle.loads(moved)


def test_two_classes_suit_the_scorers_and_the_calibration_of_scikit_learn():
    random = np.random.default_rng(0)
    images = [(random.integers(0, 128, (28, 28)) + 127 * (number % 2)).astype(np.uint8) for number in range(12)]
    labels = ["dark", "bright"] * 6
    classifier = fewshot.FewShotClassifier(nn.Flatten(), size=28, channels=1, normalise="plain", hardware="cpu")
    assert cross_val_score(classifier, images, labels, cv=3, scoring="roc_auc").mean() == 1
    fitted = classifier.fit(images, labels)
    assert (np.where(fitted.decision_function(images) > 0, "dark", "bright") == labels).all()
    assert (CalibratedClassifierCV(classifier, cv=2).fit(images, labels).predict(images) == labels).all()
