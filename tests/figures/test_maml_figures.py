import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from benchmarks.maml import make_maml, make_tasks
from fewshot.autograd import autograd_graph
from fewshot.methods.maml import total_cross_entropy
from figures.maml import PARAMETERS, QUERIES, UPDATE, _columns, _kind, _places, adaptation, maml_graph

pytestmark = pytest.mark.usefixtures("legible")


def test_adaptation_matches_the_runs_test(run, tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def record(self, x, y, *options, **named):
        drawn.setdefault(named.get("label"), []).append(y)
        return plot(self, x, y, *options, **named)

    monkeypatch.setattr(Axes, "plot", record)
    (picture,) = adaptation(str(run("maml")), 4, 8, tmp_path)
    untrained, trained = drawn["before training"], drawn[f"second order, {run('maml').name}"]
    results = json.loads((run("maml") / "results.json").read_text())
    assert trained[0][results["config"]["method"]["test_inner_steps"]] == pytest.approx(100 * results["accuracy"])
    assert trained[1][0] > trained[1][-1]  # the loss falls, if only slightly
    assert not np.allclose(untrained, trained)
    assert Image.open(picture).width > 1000


@pytest.mark.slow
def test_graphs_are_drawn_with_their_numbers_of_nodes(tmp_path, monkeypatch):
    titles = []
    set_ = Axes.set
    monkeypatch.setattr(Axes, "set", lambda self, **named: (titles.append(named.get("title")), set_(self, **named)))
    task = {"tasks": 1, "way": 2, "shot": 1, "query": 1, "channels": 1, "size": 16, "rate": 0.1}
    (picture,) = maml_graph(task, [1], tmp_path)
    assert Image.open(picture).width > 1000
    first, second = (int(title.split()[-2]) for title in titles[:2])
    assert titles[0].startswith("first order") and titles[1].startswith("second order")
    assert second > 1.5 * first


@pytest.mark.parametrize(("order", "columns"), [(1, {QUERIES, UPDATE, PARAMETERS}), (2, set(range(5)))])
def test_columns_follow_the_path_through_the_inner_step(order, columns):
    task = {"tasks": 1, "way": 2, "shot": 1, "query": 1, "channels": 1, "size": 16}
    episode = next(make_tasks(**task).tasks())
    method = make_maml(order, "loop", {**task, "steps": 1, "rate": 0.1})
    nodes, edges = autograd_graph(total_cross_entropy(method.solve(episode), episode.query_labels))
    found = _columns([_kind(node.name()) for node in nodes], edges)
    assert set(found) == columns
    assert all(found[later] <= found[earlier] for later, earlier in edges)
    x, y = _places(found, edges)
    assert len(set(zip(x.round(3), y.round(3), strict=True))) == len(nodes)  # no two in one place
