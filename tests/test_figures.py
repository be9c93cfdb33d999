import json
import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fewshot.config import ROOT, compose
from fewshot.distances import cosine, l2
from fewshot.errors import FewShotError
from fewshot.figures import (
    adaptation,
    attention_bound,
    autograd_graph,
    distance_study,
    episode,
    flattening,
    intervals,
    is_double_backward,
    maml_graph,
    prototypes,
    time_profile,
)
from fewshot.training import train

TINY = ["train.episodes=4", "train.way=5", "train.query=2", "val.episodes=2", "test.episodes=8", "encoder.filters=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir):
    """A folder of three small runs on letters."""
    folder = tmp_path_factory.mktemp("runs")
    for name, choices in {
        "protonet": ["method=protonet"],
        "matching": ["method=matching", "distance=cosine"],
        "maml": ["method=maml", "train.meta_batch=2"],
    }.items():
        train(compose(*TINY, *choices, f"run_dir={folder / name}", f"cache_dir={cache_dir}", "pictures=false"))
    return folder


def results_of(run):
    return json.loads((run / "results.json").read_text())


def write_run(folder, way, distance, seed, accuracy, scale=10.0, learn=False):
    folder.mkdir(parents=True)
    settings = {"name": distance, "scale": scale, "learn": learn}
    results = {
        **{"dataset": "omniglot", "method": "matching", "train_seconds": 1.0, "episodes": 10, "overrides": []},
        **{"way": way, "shot": 1, "distance": distance, "seed": seed, "accuracy": accuracy, "ci95": 0.002},
        "validations": [
            {"trained_episodes": step, "accuracy": accuracy - 0.1 / step, "ci95": 0.01} for step in (1, 2, 3)
        ],
        "config": {"distance": settings, "method": {"distance": settings}, "train": {"episodes": 3}},
    }
    (folder / "results.json").write_text(json.dumps(results))


def test_the_study_gathers_runs_by_way_and_distance_with_the_seeds_side_by_side(tmp_path):
    for number, run in enumerate(
        [
            (5, "l2", 0, 0.98),
            (5, "l2", 1, 0.99),
            (5, "scaled_cosine", 0, 0.97),
            (20, "cosine", 0, 0.5),
            (20, "scaled_cosine", 0, 0.9, 5.0, True),
        ]
    ):
        write_run(tmp_path / "runs" / "deep" / str(number), *run)
    write_run(tmp_path / "runs" / "maml", 5, None, 0, 0.96)  # no distance to compare
    (tmp_path / "runs" / "results.json").write_text('{"accuracy": 1}')  # of another program
    picture, table = distance_study(str(tmp_path / "runs"), tmp_path)
    assert table.read_text().splitlines()[2:] == [
        "| 5 | l2 | 3 | 98.00 ± 0.20, 99.00 ± 0.20 |",
        "| 5 | cosine × 10 | 3 | 97.00 ± 0.20 |",
        "| 20 | cosine | 3 | 50.00 ± 0.20 |",
        "| 20 | cosine × 5, learnt from there | 3 | 90.00 ± 0.20 |",
    ]
    assert Image.open(picture).width > 1000


def test_the_committed_study_is_what_its_results_say(tmp_path):
    results = ROOT / "notebooks" / "results"
    _, table = distance_study(str(results / "distance_study"), tmp_path)
    assert table.read_text() == (results / "distance_study.md").read_text()


def test_where_there_are_no_results_it_says_so(tmp_path):
    with pytest.raises(FewShotError, match=r"no results\.json .* runs=PATH"):
        distance_study(str(tmp_path), tmp_path)
    write_run(tmp_path / "maml", 5, None, 0, 0.96)
    with pytest.raises(FewShotError, match=r"by a distance.* runs=PATH"):
        distance_study(str(tmp_path), tmp_path)


def test_the_attention_bound_is_reached_and_is_the_articles_for_the_plain_cosine(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot

    def record(self, x, y, *options, **named):
        drawn.append(dict(zip(x, y, strict=True)))
        return plot(self, x, y, *options, **named)

    monkeypatch.setattr(Axes, "plot", record)
    attention_bound([1, 10], tmp_path)
    plain, scaled, plain_after_relu, _ = drawn
    assert plain[5] == pytest.approx(math.e / (math.e + 4 / math.e)) == pytest.approx(0.65, abs=0.005)
    assert scaled[50] > 0.999
    # A query equal to one support sample: the others opposite to it, or at right angles where nothing is negative.
    query = torch.tensor([[1.0, 0.0]])
    for bound, others in ((plain, [-1.0, 0.0]), (plain_after_relu, [0.0, 1.0])):
        support = torch.cat([query, torch.tensor([others]).expand(4, 2)])
        assert (-cosine(query, support)).softmax(1)[0, 0].item() == pytest.approx(bound[5], rel=1e-5)


@pytest.mark.parametrize("method", ["protonet", "matching", "maml"])
def test_an_episode_is_solved_as_the_runs_test_solved_it(runs, tmp_path, monkeypatch, method):
    right = []

    def record(_, positions, answers):
        right.append(int((answers == positions.query_labels.numpy()).sum()))
        return Figure()

    monkeypatch.setattr("fewshot.figures.draw_episode", record)
    for number in range(8):
        (picture,) = episode(str(runs / method), number, tmp_path)
    assert sum(right) == pytest.approx(results_of(runs / method)["accuracy"] * 8 * 75)
    assert picture == tmp_path / "episode.png" and picture.exists()


def test_the_interval_drawn_is_that_of_the_runs_test(runs, tmp_path, monkeypatch):
    told, labels = [], []
    monkeypatch.setattr(Axes, "annotate", lambda _, text, *__, **___: told.append(text))
    axvline = Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **named: (labels.append(x), axvline(self, x, **named)))
    (picture,) = intervals(str(runs / "protonet"), 8, tmp_path)
    results = results_of(runs / "protonet")
    assert told == [f"± {100 * results['ci95']:.2f}"]
    assert labels == [pytest.approx(100 * results["accuracy"])]
    assert Image.open(picture).width > 1000


def test_the_plane_of_three_prototypes_decides_as_all_dimensions_do_and_that_of_more_does_not():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 20, generator=generator, dtype=torch.float64)
    for way, same in ((3, True), (6, False)):
        centres = torch.randn(way, 20, generator=generator, dtype=torch.float64)
        flat = flattening(centres)
        assert flat(points).shape == (500, 2)
        assert torch.equal(l2(flat(points), flat(centres)).argmin(1), l2(points, centres).argmin(1)) == same


def test_prototypes_are_drawn_before_and_after_training_with_the_wrong_answers_circled(runs, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _, title: titles.append(title))
    (picture,) = prototypes(str(runs / "protonet"), 4, 2, 3, 1, tmp_path)
    assert [title.partition(":")[0] for title in titles] == ["before training", "after training"]
    assert all(title.endswith("of 12 queries right") for title in titles)
    assert Image.open(picture).width > 1000


def test_adaptation_ends_where_the_runs_test_did(runs, tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def record(self, x, y, *options, **named):
        drawn.setdefault(named.get("label"), []).append(y)
        return plot(self, x, y, *options, **named)

    monkeypatch.setattr(Axes, "plot", record)
    (picture,) = adaptation(str(runs), 4, 8, tmp_path)
    untrained, trained = drawn["before training"], drawn["second order, maml"]
    results = results_of(runs / "maml")
    assert trained[0][results["config"]["method"]["test_inner_steps"]] == pytest.approx(100 * results["accuracy"])
    assert trained[1][0] > trained[1][-1]  # the loss falls, if only by a little
    assert not np.allclose(untrained, trained)
    assert Image.open(picture).width > 1000


@pytest.mark.parametrize(
    ("figure", "settings", "told"),
    [
        (episode, {"run": None, "number": 0}, "no run is named; .* run=RUN_DIR"),
        (episode, {"run": "protonet", "number": -1}, r"figure\.number=-1 must be at least 0"),
        (intervals, {"run": "protonet", "episodes": 1}, r"figure\.episodes=1 must be at least 2"),
        (
            prototypes,
            {"run": "protonet", "way": 2, "shot": 1, "query": 1, "number": 0},
            r"figure\.way=2 must be 3 to 7",
        ),
        (prototypes, {"run": "matching", "way": 3, "shot": 1, "query": 1, "number": 0}, "is no run of method=protonet"),
        (prototypes, {"run": "protonet", "way": 3, "shot": 99, "query": 1, "number": 0}, "lower shot or query"),
        (adaptation, {"runs": "protonet", "steps": 1, "episodes": 2}, "no run of method=maml lies below .* runs=PATH"),
        (adaptation, {"runs": "maml", "steps": 0, "episodes": 2}, r"figure\.steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_told(runs, tmp_path, figure, settings, told):
    places = {key: str(runs / of) for key, of in settings.items() if key in ("run", "runs") and of is not None}
    with pytest.raises(FewShotError, match=told):
        figure(**{**settings, **places}, out=tmp_path)


def test_the_command_draws_from_any_directory_and_leaves_nothing_there(cli, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    done = cli(f"out={tmp_path / 'figures'}", script="figure.py", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "attention_bound.png").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    wrong = cli("figure=distance_study", f"runs={tmp_path}", script="figure.py", cwd=tmp_path / "elsewhere")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no results.json")


def test_the_graphs_of_maml_are_drawn_with_their_nodes_counted(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set", lambda _, **named: titles.append(named.get("title")))
    task = {"tasks": 1, "way": 2, "shot": 1, "query": 1, "channels": 1, "size": 16, "rate": 0.1}
    (picture,) = maml_graph(task, [1], tmp_path)
    assert Image.open(picture).width > 1000
    first, second = (int(title.split()[-2]) for title in titles[:2])
    assert titles[0].startswith("first order") and titles[1].startswith("second order")
    assert second > 1.5 * first


def test_the_time_of_a_step_is_drawn_beside_the_peak(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Axes, "text", lambda *given, **_: told.append(given[-1]))
    layer, images = torch.nn.Conv2d(1, 2, 3), torch.randn(2, 1, 8, 8)
    for name in ("bare_loop", "ours"):
        monkeypatch.setattr(f"fewshot.figures.{name}", lambda *_: lambda: layer(images).sum().backward())
    (picture,) = time_profile(1, tmp_path)
    assert Image.open(picture).width > 1000
    assert len(told) == 3 and all(text.endswith("% of the peak") for text in told)


def test_the_graph_is_walked_whole():
    x = torch.ones(2, requires_grad=True)
    nodes, edges = autograd_graph((x * x).sum() + x[0])
    names = [node.name().rstrip("0") for node in nodes]
    assert sorted(names) == sorted(
        ["AddBackward", "SumBackward", "SelectBackward", "MulBackward", "torch::autograd::AccumulateGrad"]
    )
    assert len(edges) == 6  # x is used three times
    assert is_double_backward("ConvolutionBackwardBackward0") and not is_double_backward("ConvolutionBackward0")
    assert is_double_backward("_BatchNormBackwardBackward")
