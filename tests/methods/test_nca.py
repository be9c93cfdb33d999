import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewshot.config import compose
from fewshot.data.episodes import Share
from fewshot.distances import l2
from fewshot.errors import FewShotError
from fewshot.methods.nca import NeighbourhoodComponents, neighbourhood_loss
from fewshot.training import train

TINY = ["method=nca", "way=3", "query=2", "val.episodes=3", "encoder.filters=4", "hardware=cpu", "pictures=false"]


def by_hand(distances, labels):
    losses = []
    for image, row in enumerate(distances.tolist()):
        near = [
            (math.exp(-far), label)
            for other, (far, label) in enumerate(zip(row, labels, strict=True))
            if other != image
        ]
        same = sum(nearness for nearness, label in near if label == labels[image])
        if same:
            losses.append(-math.log(same / sum(nearness for nearness, _ in near)))
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1, 2], [3, 3, 3, 3, 3], [0, 1, 2, 3, 4], [0, 0, 0, 0, 7]], ids=["", "one class", "none", "few"]
)
def test_the_loss_is_the_one_written_out(labels):
    points = torch.tensor([[0.0, 1.0], [0.5, 0.0], [2.0, 1.0], [1.0, 1.5], [0.2, 0.1]], requires_grad=True)
    distances = l2(points, points)
    loss = neighbourhood_loss(distances, torch.tensor(labels))
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(distances, labels), abs=1e-6)
    assert points.grad.isfinite().all()


def test_an_image_is_pulled_towards_its_class_however_far_it_is():
    points = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 1.0], [0.0, 1.1]], requires_grad=True)
    neighbourhood_loss(l2(points, points), torch.tensor([0, 0, 1, 1])).backward()
    assert points.grad.isfinite().all() and points.grad[1, 0] > 100


def test_a_batch_of_one_image_is_refused():
    class Plane(nn.Flatten):
        features = 2

    batch = SimpleNamespace(load=lambda: (torch.ones(1, 2), torch.tensor([0])), share=Share([]))
    with pytest.raises(FewShotError, match=r"train.batch_size=1 must be at least 2"):
        NeighbourhoodComponents(Plane(), l2).training_step(batch, 0)


def test_it_learns_resumes_and_needs_no_number_of_classes(cache_dir, tmp_path):
    settings = ["train.episodes=60", "train.batch_size=64", "val.every=60", "test.episodes=100", "schedule=none"]
    settings += ["encoder.filters=16", "way=5", "query=5", f"cache_dir={cache_dir}", "checkpoint_every=20"]
    train(compose(*TINY, *settings, f"run_dir={tmp_path / 'run'}", "train.episodes=40"))
    train(compose(*TINY, *settings, f"run_dir={tmp_path / 'run'}", "resume=auto"))
    train(compose(*TINY, *settings, f"run_dir={tmp_path / 'none'}", "train.episodes=1", "optimizer.lr=1e-30"))
    learned, untrained = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "none"))
    assert learned["accuracy"] - learned["ci95"] > untrained["accuracy"] + untrained["ci95"]
    assert "classes" not in learned["config"]["method"]
