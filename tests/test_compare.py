"""Comparison of runs: paired on equal episodes only, and untrusted text shown as text."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from conftest import layout_faults
from fewshot.compare import COLUMNS, as_html, as_markdown, collect, compare, draw, draw_times
from fewshot.config import compose
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.metrics import paired_difference
from fewshot.results import read_episodes, read_results, read_runs, write_episodes

DATA = {
    "split": "vinyals",
    **{key: {"train": 100, "val": 20, "test": 30} for key in ("classes", "images")},
    **{"class_names_sha256": {"train": "a", "val": "b", "test": "c"}, "images_sha256": "d"},
}
HOSTILE = "<script>alert(1)</script> | $x_{$ [a](http://b.c) \x1b[2J"


def write_run(folder, *, right=None, seed=0, way=5, overrides=(), **fields):
    """Write results with the accuracy of some right answers of 15 queries per class."""
    folder.mkdir(parents=True)
    right = np.full(40, 50.0) if right is None else right
    result = {
        **{"dataset": "omniglot", "method": "protonet", "distance": "l2", "encoder": "conv4", "seed": seed},
        **{"way": way, "shot": 1, "query": 15, "episodes": len(right), "ci95": 0.01, "data": DATA},
        **{"accuracy": float(right.mean() / (15 * way)), "train_seconds": 3723.0, "encoder_parameters": 111_936},
        "validations": [{"trained_episodes": 10, "accuracy": 0.9}],
        "overrides": list(overrides),
        "config": {"train": {"episodes": 10}, "eval_seed": 0, "seed": seed, "way": way},
    }
    (folder / "results.json").write_text(json.dumps(result | fields))
    write_episodes(folder / "results.json", right)
    return folder


def cells(task):
    return [dict(zip(COLUMNS, row, strict=True)) for row in task.rows]


def test_runs_of_a_task_are_compared_with_the_first_on_equal_episodes(tmp_path):
    random = np.random.default_rng(0)
    first, second = random.integers(20, 60, 40).astype(float), random.integers(20, 60, 40) + 0.5
    write_run(tmp_path / "0", right=first, overrides=["train.way=20", "way=5", "seed=0"])
    write_run(tmp_path / "1", right=second, seed=1, overrides=["train.way=60", "way=5", "seed=1"])
    write_run(tmp_path / "2", way=20, right=3 * first)
    one, other = collect(read_runs(str(tmp_path)))
    assert (one.title, other.title) == ("omniglot (vinyals), 5-way 1-shot", "omniglot (vinyals), 20-way 1-shot")
    a, b = cells(one)
    difference = paired_difference(second, first, 75)
    assert one.differences[1] == difference and a["difference"] == "reference"
    assert b["difference"] == f"{100 * difference.accuracy:+.2f} ± {100 * difference.ci95:.2f}"
    assert [row["settings"] for row in (a, b)] == ["train.way=20", "train.way=60"]
    assert [run.name for run in one.runs] == ["protonet seed 0 train.way=20", "protonet seed 1 train.way=60"]
    assert b["time"] == "1:02:03" and b["parameters"] == "111,936" and b["validation"] == "90.00"
    assert b["folder"] == "1" and not one.notes and not other.notes
    (chosen, _) = collect(read_runs(str(tmp_path)), tmp_path / "1")
    assert chosen.reference.folder == "1" and chosen.differences[0].accuracy == pytest.approx(-difference.accuracy)


def test_nothing_is_compared_on_different_or_unknown_episodes(tmp_path):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", data=DATA | {"images_sha256": "e"})
    write_run(tmp_path / "2", query=14, right=np.full(40, 50.0), accuracy=50 / 70)
    write_run(tmp_path / "3", config={"train": {"episodes": 10}, "eval_seed": 1})
    write_run(tmp_path / "4", left_out_classes=["a"])
    (write_run(tmp_path / "5") / "episodes.csv").unlink()
    write_run(tmp_path / "6", concentration=2.0)
    balanced, unbalanced = collect(read_runs(str(tmp_path)))
    assert not any(balanced.differences) and unbalanced.title == "omniglot (vinyals), 5-way 1-shot, unbalanced (2)"
    assert balanced.notes == [
        "Run 2, 3, 4, 5: no difference from run 1, because the test episodes differ (images, query, concentration "
        "or eval_seed).",
        "Run 6: no difference from run 1, because the run has no valid episodes.csv; fewshot evaluate "
        "checkpoint=RUN_DIR writes one.",
    ]
    write_run(tmp_path / "old" / "0", data=None), write_run(tmp_path / "old" / "1", data=None)
    (task,) = collect(read_runs(str(tmp_path / "old")))
    assert task.notes == ["Run 2: no difference from run 1, because the results do not record their data."]
    assert not layout_faults(draw([task]))
    assert draw([replace(task, runs=task.runs * 1200, differences=task.differences * 1200)]).get_figheight() < 110
    with pytest.raises(FewShotError, match=r"reference=.*elsewhere is not the directory of any of these runs"):
        collect(read_runs(str(tmp_path)), tmp_path / "elsewhere")


def test_runs_with_different_numbers_of_episodes_are_compared_on_the_first_ones(tmp_path):
    right = np.arange(40.0)
    write_run(tmp_path / "0", right=right)
    write_run(tmp_path / "1", right=right[:30] + 1)
    (task,) = collect(read_runs(str(tmp_path)))
    assert task.differences[1] == paired_difference(right[:30] + 1, right[:30], 75)
    assert task.notes == ["Run 2: the difference is that on the first 30 episodes, which run 1 has in common."]


def write_evaluation(folder, method, kind=0, **fields):
    """Write the result of an evaluation of an encoder without training."""
    known = {"transductive": kind > 0, "assumes_balance": kind > 1, "checkpoint": "encoder=timm", "split": "test"}
    known |= {"weights": "untrained", "train_seconds": None, "validations": [], "test_seconds_per_episode": 0.001}
    return write_run(folder, method=method, **known | fields)


def test_evaluations_are_compared_with_their_kind_and_time(tmp_path, capsys):
    for way in (5, 20):
        write_evaluation(tmp_path / f"{way}" / "0", "protonet", way=way)
        write_evaluation(tmp_path / f"{way}" / "1", "bd_cspn", 1, way=way, test_seconds_per_episode=0.01234)
        write_evaluation(tmp_path / f"{way}" / "2", "tim", 2, way=way, concentration=2.0 if way == 20 else None)
    write_run(tmp_path / "trained")
    with pytest.raises(FewShotError, match="none of the 6 results"):
        read_runs([str(tmp_path / "5"), str(tmp_path / "20")])
    _, text, _, times = compare(str(tmp_path), None, str(tmp_path / "out"))
    markdown = text.read_text()
    columns = "| method | kind | episodes | 5-way 1-shot | 20-way 1-shot | 20-way 1-shot, unbalanced (2) |"
    assert f"**omniglot (vinyals): accuracy, %**\n\n{columns}\n" in markdown
    assert "| tim conv4" not in markdown and times.name == "time.png" and "(time.png)" in markdown
    assert "| tim | transductive, assumes balance | 40 | 66.67 ± 1.00 |  | 16.67 ± 1.00 |" in markdown
    assert "| bd_cspn | transductive | 40 | 12.34 | 12.34 |  |" in markdown
    assert "without the time to embed the images" in markdown
    assert "12.34" in capsys.readouterr().out
    tasks = collect(read_runs(str(tmp_path), evaluations=True))
    kinds = {(row["method"], row["kind"]) for row in cells(tasks[0])}
    assert ("tim", "transductive, assumes balance") in kinds and ("protonet", "inductive") in kinds
    (figure,) = draw_times(tasks)
    assert not layout_faults(figure)
    assert draw_times(collect(read_runs(str(tmp_path / "trained")))) == []


def test_maml_is_transductive_whatever_earlier_versions_wrote(tmp_path):
    """Its batch norm has the statistics of the queries; results without the key, or with false, are read as before."""
    write_run(tmp_path / "old", method="maml", encoder="conv4")
    write_run(tmp_path / "false", method="maml", encoder="resnet12", transductive=False)
    write_run(tmp_path / "own", method="maml", encoder="without_batch_norm", transductive=False)
    write_run(tmp_path / "protonet", encoder="conv4", transductive=False)
    found = {path.parent.name: run for path, run in read_runs(str(tmp_path)).items()}
    kinds = {name: bool(result.get("transductive")) for name, result in found.items()}
    assert kinds == {"old": True, "false": True, "own": False, "protonet": False}
    (task,) = collect(read_runs(str(tmp_path)))
    assert sorted(row["kind"] for row in cells(task)) == ["inductive", "inductive", "transductive", "transductive"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("right\n" + "50\n" * 39, "does not belong"),
        ("right\n" + "51\n" * 40, "does not belong"),
        ("right\n" + "nan\n" * 40, "does not belong"),
        ("left\n" + "50\n" * 40, "does not belong"),
        ("right\n" + "many\n" * 40, "is broken"),
        ("", "is broken"),
    ],
)
def test_episodes_that_do_not_fit_their_results_are_skipped(tmp_path, capsys, content, message):
    run = write_run(tmp_path / "run")
    (result,) = read_results(str(run))
    assert read_episodes(run / "results.json", result).tolist() == [50.0] * 40
    (run / "episodes.csv").write_text(content)
    assert read_episodes(run / "results.json", result) is None
    assert message in capsys.readouterr().err


def test_untrusted_text_is_shown_as_text(tmp_path, capsys):
    hostile = {"method": HOSTILE, "distance": HOSTILE, "dataset": HOSTILE, "data": DATA | {"split": HOSTILE}}
    hostile |= {"trained_on": HOSTILE, "transductive": True, "test_seconds_per_episode": 0.001}
    for number in range(2):
        write_run(tmp_path / "runs" / f"[b]{number}", **hostile, overrides=[f"encoder.{HOSTILE}={number}{HOSTILE}"])
    page, text, *_ = compare(str(tmp_path / "runs"), None, str(tmp_path / "out"))
    html, markdown = page.read_text(), text.read_text()
    assert "<script" not in html and "http://b.c" in html and html.count("<img") == 2
    assert "<script" not in markdown and r"\[a\]" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| 1 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == len(COLUMNS) + 1
    assert "\x1b" not in html + markdown + capsys.readouterr().out


def test_the_figure_is_legible_with_many_and_long_names(tmp_path):
    for number in range(12):
        way = (5, 20, 30)[number % 3]
        write_run(tmp_path / str(number), way=way, method=f"a_method_{number}_" + 10 * "long_", seed=number)
    tasks = collect(read_runs(str(tmp_path)))
    assert len(tasks) == 3 and not layout_faults(draw(tasks))
    assert as_markdown(tasks).count("\n| ") == 12 + 2 * 3 - 1 + 1
    assert as_html(tasks).count("<tr>") == 12 + 3


def test_trained_runs_are_compared_as_evaluate_does(run, tmp_path, cache_dir, capsys):
    first, second = run("matching"), run("protonet")
    compare([str(first), str(second)], None, str(tmp_path / "out"))
    evaluate(
        compose(
            *(f"checkpoint={second}", f"against={first}", f"out={tmp_path / 'evaluated'}", f"cache_dir={cache_dir}"),
            name="evaluate",
        )
    )
    result = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    difference = result["difference"]
    assert f"{100 * difference['mean']:+.2f} ± {100 * difference['ci95']:.2f}" in capsys.readouterr().out
    episodes = (second / "episodes.csv").read_text()
    assert (tmp_path / "evaluated" / "episodes.csv").read_text() == episodes
    right = [float(line) for line in episodes.splitlines()[1:]]
    assert sum(right) / 8 / 15 == pytest.approx(result["accuracy"])
