import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fewshot.config import compose
from fewshot.data.episodes import EmbeddedEpisode, Share
from fewshot.distances import cosine, l2
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.methods.classifier import Baseline
from fewshot.predictor import make_predictor
from fewshot.trained import load_trained
from fewshot.training import train

TINY = ["method=classifier", "train.episodes=6", "train.batch_size=8", "way=3", "query=2", "val.episodes=3"]
TINY += ["val.every=4", "checkpoint_every=2", "test.episodes=4", "encoder.filters=4", "hardware=cpu", "pictures=false"]
WEIGHT = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


class Plane(nn.Flatten):
    features = 2


def method(distance=l2, **settings):
    made = Baseline(Plane(), distance, classes=3, **settings)
    with torch.no_grad():
        made.head.weight.copy_(WEIGHT)
        if made.head.bias is not None:
            made.head.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
    made.log_training = lambda *_: None
    return made


@pytest.mark.parametrize(
    ("settings", "logits"),
    [
        ({}, [[6.5, 4.0, -3.0], [0.5, 1.0, 0.0]]),
        ({"head": "cosine", "scale": 5.0}, [[3.0, 4.0, -3.0], [0.0, 5.0, 0.0]]),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_the_cross_entropy_over_all_training_classes(settings, logits, smoothing):
    images, labels = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0, 1])
    batch = SimpleNamespace(load=lambda: (images, labels), share=Share([], weight=0.5))
    by_hand = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        total = math.log(sum(math.exp(logit) for logit in row))
        target = [smoothing / 3 + (1 - smoothing) * (number == label) for number in range(3)]
        by_hand += sum(share * (total - logit) for share, logit in zip(target, row, strict=True)) / 2
    loss = method(**settings, label_smoothing=smoothing).training_step(batch, 0)
    assert loss.item() == pytest.approx(by_hand / 2, rel=1e-5)


@pytest.mark.parametrize(("distance", "expected"), [(l2, [[-20.0, -13.0]]), (cosine, [[-0.4, -0.01005]])])
def test_episodes_are_solved_by_the_nearest_prototype(distance, expected):
    support = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    episode = EmbeddedEpisode(support, torch.tensor([0, 0, 1, 1]), torch.tensor([[3.0, 4.0]]), torch.tensor([0]), 2)
    torch.testing.assert_close(method(distance).compare(episode), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.head=round", "method.head=round must be linear or cosine"),
        ("method.scale=0", "method.scale=0 must be a number above 0"),
        ("method.label_smoothing=1", "method.label_smoothing=1 must be a number of at least 0 and below 1"),
        ("method.classes=7", "method.classes=7: the data have [0-9]+ training classes; leave it out"),
        ("train.batch_size=null", "train.batch_size=null must be at least 1"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(override, message, cache_dir, tmp_path):
    with pytest.raises(FewShotError, match=message) as caught:
        train(compose(*TINY, override, f"run_dir={tmp_path}", f"cache_dir={cache_dir}"))
    assert "\n" not in str(caught.value)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_resumed_run_ends_like_an_uninterrupted_one(cache_dir, tmp_path):
    # No schedule, since its length must not change.
    settings = [*TINY, "schedule=none", "transform=flip", "train.meta_batch=2", f"cache_dir={cache_dir}"]
    train(compose(*settings, f"run_dir={tmp_path / 'whole'}", "train.episodes=10"))
    train(compose(*settings, f"run_dir={tmp_path / 'parts'}", "train.episodes=4"))
    train(compose(*settings, f"run_dir={tmp_path / 'parts'}", "train.episodes=10", "resume=auto"))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "parts")]
    assert results[0]["accuracy"] == results[1]["accuracy"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory, cache_dir):
    """A run long enough to learn something."""
    run = tmp_path_factory.mktemp("learned")
    settings = ["train.episodes=150", "train.batch_size=32", "val.every=150", "test.episodes=50", "optimizer.lr=0.05"]
    settings += ["val.episodes=50", "encoder.filters=16", "way=5", "query=5", "method.head=cosine"]
    train(compose(*TINY, *settings, f"run_dir={run}", f"cache_dir={cache_dir}"))
    return run


def test_learned_features_separate_new_classes(learned):
    results = json.loads((learned / "results.json").read_text())
    train(compose(*_untrained(results), f"run_dir={learned / 'untrained'}"))
    untrained = json.loads((learned / "untrained" / "results.json").read_text())
    assert results["accuracy"] - results["ci95"] > untrained["accuracy"] + untrained["ci95"]
    assert results["config"]["method"]["classes"] == results["data"]["classes"]["train"]


def _untrained(results):
    config = results["config"]
    same = ["train.episodes=1", "optimizer.lr=1e-30", "test.episodes=50", "val.episodes=2", "encoder.filters=16"]
    return [*TINY, *same, "way=5", "query=5", f"cache_dir={config['cache_dir']}"]


def test_checkpoint_is_evaluated_and_used_for_predictions(learned, tmp_path, cache_dir):
    config = compose(
        f"checkpoint={learned}", f"out={tmp_path}", f"cache_dir={cache_dir}", "hardware=cpu", name="evaluate"
    )
    results = json.loads((learned / "results.json").read_text())
    assert evaluate(config) == pytest.approx(results["accuracy"], abs=1e-12)
    predictor = make_predictor(compose(f"checkpoint={learned}", "support=x", "query=x", "hardware=cpu", name="predict"))
    random = np.random.default_rng(0)
    size = results["config"]["dataset"]["size"]
    pixels = [random.integers(0, 256, (size, size, 1), dtype=np.uint8) for _ in range(4)]
    answer = predictor.learn({"a": pixels[:2], "b": pixels[2:]})(pixels)
    assert answer.shape == (4, 2)


def test_an_episodic_method_starts_from_its_encoder(learned, tmp_path, cache_dir):
    little = ["train.episodes=1", "train.way=3", "way=5", "query=5", "test.episodes=50", "val.episodes=2"]
    little += ["encoder.filters=16", "hardware=cpu", "pictures=false", "optimizer.lr=1e-30", f"cache_dir={cache_dir}"]
    train(compose(*little, f"encoder.init={learned}", f"run_dir={tmp_path}"))
    begun, trained = load_trained(str(learned)).method.encoder, load_trained(str(tmp_path)).method.encoder
    assert all(map(torch.equal, begun.parameters(), trained.parameters()))


OWN = """
import torch
from fewshot.methods.protonet import PrototypicalNetwork

class Regression(PrototypicalNetwork):
    trains_on = "classes"

    def __init__(self, encoder, distance, classes: int):
        super().__init__(encoder, distance)
        self.targets = torch.nn.Embedding(classes, encoder.features)

    def training_step(self, batch, batch_idx):
        images, labels = batch.load()
        return (self.encoder(images) - self.targets(labels)).square().mean() * batch.share.weight
"""


def test_a_user_supplied_method_trains_on_classes(cache_dir, tmp_path, monkeypatch):
    (tmp_path / "mine_on_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_on_classes", raising=False)
    settings = [
        "method._target_=mine_on_classes.Regression",
        "~method.head",
        "~method.scale",
        "~method.label_smoothing",
    ]
    train(compose(*TINY, *settings, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}"))
    trained = load_trained(str(tmp_path / "run"), trust="mine_on_classes")
    classes = json.loads((tmp_path / "run" / "results.json").read_text())["data"]["classes"]["train"]
    assert trained.method.targets.num_embeddings == classes
