import json
import math

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from fewshot.config import ROOT
from fewshot.distances import cosine
from fewshot.errors import FewShotError
from figures.matching import attention_bound, distance_study

pytestmark = pytest.mark.usefixtures("legible")


def write_run(folder, way, distance, seed, accuracy, scale=10.0, learn=False, **other):
    folder.mkdir(parents=True)
    settings = {"name": distance, "scale": scale, "learn": learn}
    results = {
        **{"dataset": "omniglot", "method": "matching", "train_seconds": 1.0, "episodes": 10, "overrides": []},
        **{"way": way, "shot": 1, "distance": distance, "seed": seed, "accuracy": accuracy, "ci95": 0.002},
        "validations": [
            {"trained_episodes": step, "accuracy": accuracy - 0.1 / step, "ci95": 0.01} for step in (1, 2, 3)
        ],
        "config": {"distance": settings, "method": {"distance": settings}, "train": {"episodes": 3}},
        **other,
    }
    (folder / "results.json").write_text(json.dumps(results))


def test_the_study_groups_runs_by_way_and_distance_over_seeds(tmp_path):
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
    for name in ("last", "best"):  # evaluations, of different weights or of the task of the run's own test
        marks = {"split": "test", "checkpoint": f"0/checkpoints/{name}.ckpt", "weights": name}
        write_run(tmp_path / "runs" / "again" / name, 5, "l2", 0, 0.5, **marks)
    (tmp_path / "runs" / "results.json").write_text('{"accuracy": 1}')  # of another program
    picture, table = distance_study(str(tmp_path / "runs"), tmp_path)
    assert table.read_text().splitlines()[2:] == [
        "| 5 | l2 | 3 | 98.00 ± 0.20, 99.00 ± 0.20 |",
        "| 5 | cosine × 10 | 3 | 97.00 ± 0.20 |",
        "| 20 | cosine | 3 | 50.00 ± 0.20 |",
        "| 20 | cosine × 5, learnt from there | 3 | 90.00 ± 0.20 |",
    ]
    assert Image.open(picture).width > 1000


def test_the_committed_study_matches_its_results(tmp_path):
    results = ROOT / "notebooks" / "results"
    _, table = distance_study(str(results / "distance_study"), tmp_path)
    assert table.read_text() == (results / "distance_study.md").read_text()


def test_missing_results_are_reported(tmp_path):
    with pytest.raises(FewShotError, match=r"no results\.json .* runs=PATH"):
        distance_study(str(tmp_path), tmp_path)
    write_run(tmp_path / "maml", 5, None, 0, 0.96)
    with pytest.raises(FewShotError, match=r"with a distance.* runs=PATH"):
        distance_study(str(tmp_path), tmp_path)


def test_the_attention_bound_is_tight_and_matches_the_article_for_the_plain_cosine(tmp_path, monkeypatch):
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
    # The query equals one support sample; the others are opposite to it, or orthogonal if nothing can be negative.
    query = torch.tensor([[1.0, 0.0]])
    for bound, others in ((plain, [-1.0, 0.0]), (plain_after_relu, [0.0, 1.0])):
        support = torch.cat([query, torch.tensor([others]).expand(4, 2)])
        assert (-cosine(query, support)).softmax(1)[0, 0].item() == pytest.approx(bound[5], rel=1e-5)


def test_the_command_leaves_no_files_in_the_working_directory(cli, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    done = cli(f"out={tmp_path / 'figures'}", script="figure.py", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "attention_bound.png").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    wrong = cli("figure=distance_study", f"runs={tmp_path}", script="figure.py", cwd=tmp_path / "elsewhere")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no results.json")
