"""mirror=true: validation, test and predictions compare the mean embedding of an image and its mirror image."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fewshot
from fewshot.checkpoints import read_weights
from fewshot.config import compose
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import Episode
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.export import export
from fewshot.methods.base import set_mirror
from fewshot.methods.maml import MAML
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.prediction import predict
from fewshot.report import _differences, changes
from fewshot.results import by_settings, own_validation, read_results, settings
from fewshot.teaching import teach
from fewshot.trained import load_trained
from fewshot.training import train

TINY = ["train.episodes=40", "train.way=5", "query=4", "encoder.filters=8", "val.episodes=3", "test.episodes=40"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    """Trains once, a little; returns the directory of the run."""
    runs = {}

    def trained(*overrides):
        if overrides not in runs:
            runs[overrides] = tmp_path_factory.mktemp("run")
            train(compose(*TINY, *overrides, f"run_dir={runs[overrides]}", f"cache_dir={cache_dir}"))
        return runs[overrides]

    return trained


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of images that are not symmetric, and the mirror image of each query."""
    home, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("support/a", "support/b", "query"):
        (home / name).mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(home / name / f"{number}.png")
            if name == "query":
                Image.fromarray(pixels[:, ::-1]).save(home / name / f"{number} mirrored.png")
    return home


def result_of(run_dir, out, cache_dir, *overrides):
    evaluate(compose(f"checkpoint={run_dir}", f"out={out}", f"cache_dir={cache_dir}", *overrides, name="evaluate"))
    return json.loads((out / "results.json").read_text())


def test_an_answer_compares_means_and_training_does_not():
    method = PrototypicalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    images = torch.randn(5, 1, 3, 4)
    once, mirrored = method.encoder(images), method.encoder(images.flip(-1))
    assert torch.equal(method.represent(images), once)
    set_mirror(method, mirror=True)
    torch.testing.assert_close(method.represent(images), (once + mirrored) / 2)
    torch.testing.assert_close(method.represent(images.flip(-1)), method.represent(images))
    episode = Episode(images[:2], torch.tensor([0, 1]), images[2:], torch.tensor([0, 1, 0]), 2)
    torch.testing.assert_close(method.train().embed_episode(episode).query, once[2:])
    torch.testing.assert_close(method.eval().embed_episode(episode).query, ((once + mirrored) / 2)[2:])
    set_mirror(method, mirror=None)
    assert not method.mirror


def test_a_test_uses_the_means_and_the_cache_keeps_them_apart(run, tmp_path, cache_dir):
    plain, mirrored, again = (
        result_of(run(), tmp_path / str(number), cache_dir, *mirror)
        for number, mirror in enumerate([[], ["mirror=true"], []])
    )
    assert plain["accuracy"] == again["accuracy"] != mirrored["accuracy"]
    assert "mirror=true" in mirrored["overrides"] and mirrored["config"]["mirror"] is True

    trained = load_trained(str(run()))
    data = EpisodeDataModule(
        trained.config.dataset,
        **{
            key: trained.config[key]
            for key in ("way", "shot", "query", "train", "val", "test", "seed", "eval_seed", "checkpoint_every")
        },
        cache_dir=cache_dir,
    )
    data.setup()
    right = []
    for batch in data.test_dataloader():
        for episode in batch.load().tasks():
            support, query = (
                (trained.method.encoder(images) + trained.method.encoder(images.flip(-1))) / 2
                for images in (episode.support, episode.query)
            )
            prototypes = torch.stack([support[episode.support_labels == label].mean(0) for label in range(5)])
            right.append((torch.cdist(query, prototypes).argmin(1) == episode.query_labels).double().mean())
    assert mirrored["accuracy"] == pytest.approx(float(torch.stack(right).mean()))


def test_a_run_chooses_its_weights_and_is_tested_and_resumed_with_it(run, tmp_path, cache_dir):
    own = json.loads((run("mirror=true") / "results.json").read_text())
    found = result_of(run("mirror=true"), tmp_path / "own", cache_dir)
    assert own["accuracy"] == found["accuracy"] and own["config"]["mirror"] is True
    without = result_of(run("mirror=true"), tmp_path / "without", cache_dir, "mirror=false")
    plain = json.loads((run() / "results.json").read_text())
    assert without["accuracy"] == plain["accuracy"] != own["accuracy"]  # the training is the same


def test_the_report_gives_it_a_line_that_says_so(run, tmp_path, cache_dir):
    mirrored = result_of(run(), tmp_path / "mirrored", cache_dir, "mirror=true")
    found = read_results([str(run()), str(tmp_path / "mirrored")])
    assert len(by_settings(found)) == 2
    assert settings(mirrored)["test.mirror"] is True
    assert "mirror=true" in changes(mirrored)
    plain, other = (next(result for result in found if result["config"].get("mirror") is on) for on in (None, True))
    assert _differences(other, plain) == []  # the column of the settings has it as mirror=true


def test_a_test_without_it_of_a_run_with_it_has_a_line_of_its_own(run, tmp_path, cache_dir):
    without = result_of(run("mirror=true"), tmp_path / "without", cache_dir, "mirror=false")
    assert len(by_settings(read_results([str(run("mirror=true")), str(tmp_path / "without")]))) == 2
    assert own_validation(without) is None  # the weights were chosen with it


def test_predictions_are_the_same_for_mirror_images(run, photos, tmp_path):
    def probabilities(*overrides):
        out = tmp_path / "out"
        predict(compose(*overrides, f"query={photos / 'query'}", f"out={out}", "hardware=cpu", name="predict"))
        with (out / "predictions.csv").open(newline="") as file:
            return [float(row["probability"]) for row in csv.DictReader(file)]

    def assert_symmetric(found):
        np.testing.assert_allclose(found[::2], found[1::2], atol=1e-3)

    support, checkpoint = f"support={photos / 'support'}", f"checkpoint={run()}"
    once = probabilities(checkpoint, support)
    assert not np.allclose(once[::2], once[1::2], atol=1e-3)
    found = probabilities(checkpoint, support, "mirror=true")
    assert_symmetric(found)
    assert probabilities(checkpoint, support) == once  # the cache of embeddings does not confuse them
    assert_symmetric(probabilities(f"checkpoint={run('mirror=true')}", support))

    model = tmp_path / "model.fewshot"
    teach(compose(checkpoint, support, "mirror=true", f"out={model}", "hardware=cpu", name="teach"))
    np.testing.assert_allclose(probabilities(f"model={model}"), found, atol=1e-3)
    with pytest.raises(FewShotError, match=r"mirror=false: model=.* decides that"):
        probabilities(f"model={model}", "mirror=false")
    with pytest.raises(FewShotError, match=r"mirror=false: model=.* decides that"):
        teach(compose(f"model={model}", support, "mirror=false", f"out={tmp_path / 'x'}", name="teach"))


def test_the_estimator_and_its_file_do_the_same(run, tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8))
    labels, turned = ["a", "a", "b", "b"], [image[:, ::-1].copy() for image in images]
    for model in (run(), PrototypicalNetwork(nn.Flatten())):
        format_ = {} if model == run() else {"size": 28, "channels": 1}
        plain = fewshot.FewShotClassifier(model, hardware="cpu", **format_).fit(images, labels)
        assert not np.allclose(plain.predict_proba(turned), plain.predict_proba(images), atol=1e-5)
        mirrored = fewshot.FewShotClassifier(model, hardware="cpu", mirror=True, **format_).fit(images, labels)
        np.testing.assert_allclose(mirrored.predict_proba(turned), mirrored.predict_proba(images), atol=1e-5)
    kept = fewshot.FewShotClassifier(run(), hardware="cpu", mirror=True).fit(images, labels)
    kept.save(tmp_path / "kept.safetensors")
    assert read_weights(tmp_path / "kept.safetensors")[0]["config"]["mirror"] is True
    loaded = fewshot.FewShotClassifier.load(tmp_path / "kept.safetensors", hardware="cpu")
    np.testing.assert_allclose(loaded.predict_proba(turned), kept.predict_proba(images), atol=1e-5)


def test_an_exported_encoder_does_the_same(run, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} of the extra export is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime of the extra export is not installed")
    export(str(run("mirror=true")), str(tmp_path / "encoder.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    (found,), (turned,) = (session.run(None, {"pixels": each}) for each in (pixels, pixels[:, :, ::-1].copy()))
    np.testing.assert_allclose(found, turned, rtol=1e-3, atol=1e-5)


def test_a_method_that_adapts_a_network_has_no_embeddings_to_average(run, tmp_path, cache_dir):
    message = r"mirror=true: MAML has no embeddings to average.*method=protonet"
    with pytest.raises(FewShotError, match=message):
        train(compose(*TINY, "method=maml", "mirror=true", f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}"))
    with pytest.raises(FewShotError, match=message):
        result_of(run("method=maml"), tmp_path / "out", cache_dir, "mirror=true")
    with pytest.raises(FewShotError, match=message):
        set_mirror(MAML.__new__(MAML), mirror=True)
    with pytest.raises(FewShotError, match=r"mirror=3"):
        result_of(run(), tmp_path / "out", cache_dir, "mirror=3")
