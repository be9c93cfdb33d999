import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fewshot import cli as command_line
from fewshot.config import ROOT, compose
from fewshot.errors import FewShotError
from fewshot.report import CLOSING, OPENING, collect, draw_curves, refresh, report
from fewshot.results import by_settings, read_results

CONFIG = compose(name="report")
CELL = "omniglot/protonet_5way_1shot"


def result(experiment: str | None = CELL, seed: int = 0, accuracy: float = 0.99, **other) -> dict:
    named = f"{experiment or 'glyphs/none_2way_3shot'}".replace("way_", "_").replace("shot", "").rsplit("_", 2)
    return {
        **{"dataset": named[0].split("/")[0], "method": "protonet", "distance": "l2"},
        **{"way": int(named[1]), "shot": int(named[2]), "query": 15, "experiment": experiment, "budget": "cpu"},
        **{"accuracy": accuracy, "ci95": 0.002, "episodes": 1000, "seed": seed, "train_seconds": 600.0},
        **{"machine": {"processor": "abacus", "threads": 2}, "overrides": [f"seed={seed}"]},
        "validations": [{"trained_episodes": 10, "accuracy": accuracy, "ci95": 0.01, "episodes": 10}],
        "config": {"train": {"episodes": 4000}, "method": {}, "run_dir": f"outputs/{seed}", "seed": seed},
        **other,
    }


def write(path: Path, content: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_report(runs: Path, out: Path, readme: Path | None = None) -> list[Path]:
    return report(str(runs), CONFIG.tables, CONFIG.sources, str(out), str(readme) if readme else None)


def test_results_are_found_at_any_depth_once_and_what_is_no_result_is_named_and_skipped(tmp_path, capsys):
    write(tmp_path / "a", result(seed=0))
    deep = write(tmp_path / "a" / "multirun" / "3", result(seed=1))
    for name, content in {
        "broken": '{"accuracy": 0.9',
        "bytes": "",
        "foreign": {"accuracy": 0.9},
        "list": [1],
        "deep": "[" * 100_000,
        "over": result(accuracy=98.0),
        "nan": result(ci95=float("nan")),
        "typed": result() | {"seed": "0"},
        "train": result() | {"config": {}},
        "curve": result() | {"validations": [{"accuracy": 0.9}]},
        "optional": result() | {"machine": "abacus"},
    }.items():
        write(tmp_path / "b" / name, content)
    (tmp_path / "b" / "bytes" / "results.json").write_bytes(b"\xff\xfe\x00")
    found = read_results([str(tmp_path), str(deep / "results.json"), str(tmp_path / "none")])
    assert sorted(of["seed"] for of in found) == [0, 1]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 12 and all(line.startswith(f"skipped {tmp_path}") for line in told)
    assert "no sound seed" in "".join(line for line in told if "/typed/" in line)
    assert "accuracy is 98.0" in "".join(line for line in told if "/over/" in line)
    with pytest.raises(FewShotError, match=rf"no results\.json .*{tmp_path}/b"):
        read_results(str(tmp_path / "b"))


def test_a_cell_has_a_line_for_each_of_its_settings_and_one_where_it_did_not_run(capsys):
    found = [
        result(seed=1, accuracy=0.98, ci95=0.003),
        result(seed=0, accuracy=0.99),
        result(seed=0, accuracy=0.99),  # a copy
        result(budget="paper"),
        result("omniglot/maml_2nd_20way_5shot", accuracy=0.96, distance=None),
        result(None, overrides=["way=2"], budget=None),
        result(dataset="glyphs", seed=7, config={"train": {"episodes": 4000}, "dataset": {}}),
    ]
    lines = collect(found, CONFIG.tables)
    ran = [line for line in lines if line.runs]
    assert [len(line.runs) for line in ran] == [2, 1, 1, 1, 1]
    assert [run["seed"] for run in ran[0].runs] == [0, 1]
    assert (ran[0].published, ran[0].article, ran[0].accuracies, ran[0].ci95) == (98.8, 98.2, [99, 98], 0.3)
    assert (ran[2].method, ran[2].way, ran[2].published, ran[2].article) == ("MAML, 2nd order", 20, 98.9, 95.9)
    assert (ran[3].dataset, ran[3].method, ran[3].published) == ("Other runs on glyphs", "protonet l2", None)
    assert (ran[4].dataset, ran[4].experiment, ran[4].published) == ("Other runs on glyphs", CELL, None)
    assert len(lines) == 24 + 18 + 1 + 2  # both tables, a second setting, the runs of no cell
    assert capsys.readouterr().err.startswith("counted once: omniglot/protonet_5way_1shot, seed 0")


def test_results_are_alike_wherever_their_data_lay_and_not_if_a_setting_differs():
    def at(data_dir: str, episodes: int, seed: int) -> dict:
        dataset = {"size": 28, "source": {"data_dir": data_dir, "split": "vinyals"}}
        return result(seed=seed) | {"config": {"train": {"episodes": episodes}, "dataset": dataset}}

    assert len(by_settings([at("here", 10, 0), at("there", 10, 1)])) == 1
    assert len(by_settings([at("here", 10, 0), at("here", 20, 1)])) == 2


def test_overrides_that_make_a_cell_another_one_are_told_beside_its_budget():
    overrides = [f"experiment={CELL}", "budget=cpu", "seed=1", "resume=auto", "hydra.run.dir=x", "train.episodes=9"]
    (line,) = (line for line in collect([result(overrides=overrides)], CONFIG.tables) if line.runs)
    assert line.budget == "cpu, train.episodes=9"
    overrides[0] = "+experiment/omniglot=protonet_5way_1shot"
    (line,) = (line for line in collect([result(overrides=overrides[:-1])], CONFIG.tables) if line.runs)
    assert line.budget == "cpu"


def test_the_report_sets_ours_beside_the_published_and_leaves_empty_what_did_not_run(tmp_path):
    write(tmp_path / "runs" / "x", result(seed=0, accuracy=0.99))
    write(tmp_path / "runs" / "y", result(seed=3, accuracy=0.98))
    write(tmp_path / "runs" / "z", result("miniimagenet/protonet_5way_5shot", accuracy=0.6, machine=None))
    text, table, picture, _ = write_report(tmp_path / "runs", tmp_path / "new" / "out")
    rows = [row for row in text.read_text().splitlines() if row.startswith("| ") and "method" not in row]
    ours = "98.50 ± 0.20 | 2 (98.00 to 99.00) | 1,000 | cpu | 4,000 | 10 min | 1"
    assert rows[1] == f"| Prototypical networks | 5-way 1-shot | 98.8 | 98.2 | {ours} |"
    assert rows[2] == "| Prototypical networks | 5-way 5-shot | 99.7 | 99.4 |  |  |  |  |  |  |  |"
    assert "60.00 ± 0.20 | 1 | 1,000 | cpu | 4,000 | 10 min |  |" in text.read_text()
    assert "Machine 1: abacus, 2 threads." in text.read_text()
    with table.open() as file:
        values = list(csv.DictReader(file))
    assert len(values) == 24 + 18
    assert (values[0]["ours"], values[0]["lowest"], values[0]["seeds"]) == ("98.5", "98.0", "0 3")
    assert values[1]["published"] == "99.7" and not values[1]["ours"]
    assert Image.open(picture).width > 1500


def test_the_cells_below_the_article_have_the_curves_of_their_trainings(tmp_path, monkeypatch):
    curve = [{"trained_episodes": 10 * step, "accuracy": 0.9 + step / 100} for step in range(1, 5)]
    write(tmp_path / "runs" / "above", result("omniglot/protonet_5way_5shot", accuracy=0.999))
    short = write(tmp_path / "runs" / "short", result(accuracy=0.95, validations=curve))
    write(
        tmp_path / "runs" / "long", result(accuracy=0.99, overrides=["train.way=9"], config={"train": {"episodes": 7}})
    )
    written = write_report(tmp_path / "runs", tmp_path / "out", None)
    assert "](curves.png)" in written[0].read_text()
    lines = collect(read_results(str(tmp_path / "runs")), CONFIG.tables)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert draw_curves(lines, tmp_path / "curves.png")
    monkeypatch.undo()
    (panel,) = figures[0].axes
    assert panel.get_title() == "Omniglot: Prototypical networks, 5-way 1-shot"
    assert {text.get_text() for text in panel.get_legend().get_texts()} == {"cpu", "cpu, train.way=9"}
    drawn = [line.get_xydata().tolist() for line in panel.lines]
    assert [[10 * step, 90 + step] for step in range(1, 5)] in drawn
    assert [[40, 95]] in drawn  # the test, at the best validation
    shutil.rmtree(short)
    written = write_report(tmp_path / "runs", tmp_path / "out", None)
    assert "curves.png" not in written[0].read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.csv", "report.md", "report.png"]


def test_the_readme_has_the_cells_that_ran_and_nothing_else_of_it_changes(tmp_path):
    write(tmp_path / "runs", result(accuracy=1.0))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{OPENING}\nold | text\n{CLOSING}\nafter\n")
    for _ in range(2):  # the second time there is nothing to do
        write_report(tmp_path / "runs", tmp_path / "out", page)
        text = page.read_text()
        assert text.startswith(f"before\n{OPENING}\n") and text.endswith(f"{CLOSING}\nafter\n")
        assert "old" not in text and text.count("100.00 ± 0.20") == 1
        assert len([row for row in text.splitlines() if row.startswith("| ")]) == 3
        assert "](../out/report.png)" in text
    page.write_text(f"{CLOSING}\n{OPENING}\n")
    with pytest.raises(FewShotError, match="add them"):
        refresh(page, "text")
    assert page.read_text() == f"{CLOSING}\n{OPENING}\n"


def test_the_readme_of_this_project_tells_the_committed_results(tmp_path):
    runs, page = ROOT / "notebooks" / "results" / "reproduction", ROOT / "README.md"
    between = page.read_text().partition(OPENING)[2].partition(CLOSING)[0].strip()
    if not runs.exists():
        assert not between
        return
    copy = shutil.copy(page, tmp_path / "README.md")
    write_report(runs, tmp_path, copy)
    told = Path(copy).read_text().partition(OPENING)[2].partition(CLOSING)[0].strip()
    assert re.sub(r"\]\((\w+\.png)\)", r"](notebooks/results/reproduction/\1)", told) == between


def test_the_command_takes_paths_first_from_any_directory_and_leaves_nothing_there(cli, tmp_path):
    here = tmp_path / "elsewhere"
    odd = write(here / "it's {odd}, a=b", result())
    write(tmp_path / "more", result(seed=1))
    (tmp_path / "page.md").write_text(f"{OPENING}\n{CLOSING}")
    given = (odd.name, tmp_path / "more", f"out={tmp_path / 'out'}", f"readme={tmp_path / 'page.md'}")
    done = cli(*given, script="report.py", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "| 2 (99.00 to 99.00) |" in (tmp_path / "page.md").read_text()
    assert [path.name for path in here.iterdir()] == [odd.name]
    wrong = cli(tmp_path / "out", script="report.py")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no results.json") and len(wrong.stderr.splitlines()) == 1
    assert "# python src/report.py RUNS..." in cli("--help", script="report.py").stdout


def test_only_leading_arguments_go_without_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    for given, named in {
        ("x",): ["runs=['x']"],
        ("x", "a=b", "out=y"): ["runs=['x','a=b']", "out=y"],
        ("out=y", "--cfg", "job"): ["out=y", "--cfg", "job"],
        ("--help",): ["--help"],
        (): [],
    }.items():
        arguments = ["program", *given]
        command_line.name_leading("runs", arguments)
        assert arguments[1:] == named
