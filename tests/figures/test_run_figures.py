import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fewshot.distances import l2
from fewshot.errors import FewShotError
from figures.maml import adaptation
from figures.runs import _free_places, episode, flattening, intervals, prototypes

pytestmark = pytest.mark.usefixtures("legible")


def results_of(run):
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("method", ["protonet", "matching", "maml"])
def test_episodes_are_solved_as_in_the_runs_test(run, tmp_path, monkeypatch, method):
    right = []

    def record(_, positions, answers):
        right.append(int((answers == positions.query_labels.numpy()).sum()))
        return Figure()

    monkeypatch.setattr("figures.runs.draw_episode", record)
    for number in range(8):
        (picture,) = episode(str(run(method)), number, tmp_path)
    assert sum(right) == pytest.approx(results_of(run(method))["accuracy"] * 8 * 15)
    assert picture == tmp_path / "episode.png" and picture.exists()


def test_the_interval_matches_the_runs_test(run, tmp_path, monkeypatch):
    notes, labels = [], []
    annotate = Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda *given, **named: (notes.append(given[1]), annotate(*given, **named)))
    axvline = Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **named: (labels.append(x), axvline(self, x, **named)))
    (picture,) = intervals(str(run("protonet")), 8, tmp_path)
    results = results_of(run("protonet"))
    assert notes == [f"± {100 * results['ci95']:.2f}"]
    assert labels == [pytest.approx(100 * results["accuracy"])]
    assert Image.open(picture).width > 1000


def test_pictures_cover_neither_points_nor_each_other():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(60, 2))
    centres = points[:5]
    side = 0.55 * np.ptp(points, axis=0).max()
    places = np.array(_free_places(points, centres, side))
    half = 0.13 * side
    assert (np.abs(places[:, None] - points).max(-1) > half).all()
    apart = np.abs(places[:, None] - places).max(-1)
    assert (apart[~np.eye(5, dtype=bool)] > 2 * half).all()


def test_regions_are_exact_for_three_prototypes_only():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 20, generator=generator, dtype=torch.float64)
    for way, same in ((3, True), (6, False)):
        centres = torch.randn(way, 20, generator=generator, dtype=torch.float64)
        flat = flattening(centres)
        assert flat(points).shape == (500, 2)
        assert torch.equal(l2(flat(points), flat(centres)).argmin(1), l2(points, centres).argmin(1)) == same


def test_prototypes_are_drawn_before_and_after_training(run, tmp_path, monkeypatch):
    titles = []
    set_title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, title: (titles.append(title), set_title(self, title)))
    (picture,) = prototypes(str(run("protonet")), 4, 2, 3, 1, tmp_path)
    assert [title.partition(":")[0] for title in titles] == ["before training", "after training"]
    assert all(title.endswith("of 12 queries right") for title in titles)
    assert Image.open(picture).width > 1000


@pytest.mark.parametrize(
    ("figure", "settings", "message"),
    [
        (episode, {"run": None, "number": 0}, "no run is given; .* run=RUN_DIR"),
        (episode, {"run": "protonet", "number": -1}, r"figure\.number=-1 must be at least 0"),
        (intervals, {"run": "protonet", "episodes": 1}, r"figure\.episodes=1 must be at least 2"),
        (
            prototypes,
            {"run": "protonet", "way": 2, "shot": 1, "query": 1, "number": 0},
            r"figure\.way=2 must be 3 to 7",
        ),
        (
            prototypes,
            {"run": "matching", "way": 3, "shot": 1, "query": 1, "number": 0},
            "is not a run of method=protonet",
        ),
        (prototypes, {"run": "protonet", "way": 3, "shot": 99, "query": 1, "number": 0}, "lower shot or query"),
        (adaptation, {"runs": "protonet", "steps": 1, "episodes": 2}, "no run of method=maml below .* runs=PATH"),
        (adaptation, {"runs": "maml", "steps": 0, "episodes": 2}, r"figure\.steps=0 must be at least 1"),
    ],
)
def test_invalid_settings_are_reported(run, tmp_path, figure, settings, message):
    paths = {key: str(run(name)) for key, name in settings.items() if key in ("run", "runs") and name is not None}
    with pytest.raises(FewShotError, match=message):
        figure(**{**settings, **paths}, out=tmp_path)
