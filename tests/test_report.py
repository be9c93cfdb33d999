import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from fewshot import cli as command_line
from fewshot.config import ROOT, compose
from fewshot.errors import FewShotError
from fewshot.report import (
    CLOSING,
    OPENING,
    REFERENCES,
    Line,
    Reference,
    collect,
    draw_curves,
    markdown,
    refresh,
    report,
)
from fewshot.results import by_settings, find_results, read_results

CONFIG = compose(name="report")
CELL = "omniglot/protonet_5way_1shot"
CLASSES = {"omniglot": (4112, 688, 1692), "miniimagenet": (64, 16, 20), "glyphs": (30, 10, 12)}

pytestmark = pytest.mark.usefixtures("legible")


def result(cell: str = CELL, *, seed: int = 0, split: str | None = "vinyals", images: int = 20, **other) -> dict:
    """Make the result of a run; other settings by their dotted keys below ``config``, or by keys of the result."""
    dataset, _, rest = cell.partition("/")
    name, way, shot = rest.replace("way", "").replace("shot", "").rsplit("_", 2)
    method, order = ("maml", int(name[5])) if name.startswith("maml") else (name.partition("_")[0], None)
    method += "_fce" if "fce" in name else ""
    distance = name.removeprefix(f"{method}_") if method.startswith("matching") else "l2"
    counts = dict(zip(("train", "val", "test"), CLASSES[dataset], strict=True))
    config = OmegaConf.create(
        {
            **{"way": int(way), "shot": int(shot), "query": 15, "seed": seed, "run_dir": f"outputs/{seed}"},
            "train": {"way": int(way), "shot": int(shot), "query": 5, "episodes": 4000, "meta_batch": 1},
            "dataset": {"size": 28, "source": {"data_dir": "data", "split": split}},
            "method": {"distance": {"_target_": distance}, "encoder": {"filters": 64}, "order": order},
            "hardware": {"precision": "32-true"},
            "choices": {"dataset": dataset, "method": method, "distance": distance, "encoder": "conv4"},
        }
    )
    for key in [key for key in other if "." in key]:
        OmegaConf.update(config, key, other.pop(key), force_add=True)
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    accuracy = other.get("accuracy", 0.99)
    return {
        **{"dataset": dataset, "method": method, "distance": None if order else distance, "encoder": "conv4"},
        **{key: plain[key] for key in ("way", "shot", "query", "seed")},
        **{"experiment": cell, "budget": "cpu", "accuracy": accuracy, "ci95": 0.002, "episodes": 1000},
        **{"train_seconds": 600.0, "machine": {"processor": "abacus", "threads": 2}, "overrides": [f"seed={seed}"]},
        **{"precision": "32-true", "encoder_parameters": 111_936},
        "data": {
            **{"split": split, "classes": counts, "images": {key: images * count for key, count in counts.items()}},
            "class_names_sha256": {key: f"{split} {key}" for key in counts},
            "images_sha256": f"{split} {images}",
        },
        "validations": [{"trained_episodes": 10, "accuracy": accuracy, "ci95": 0.01, "episodes": 10}],
        "config": plain,
        **other,
    }


def evaluation(run: dict, way: int, shot: int, **other) -> dict:
    """Make the result of an evaluation of a run."""
    config = {**run["config"], "way": way, "shot": shot}
    kept = {key: value for key, value in run.items() if key != "meta_batch"} | {"way": way, "shot": shot}
    marks = {"split": "test", "checkpoint": "run/checkpoints/best.ckpt", "weights": "best"}
    return {**kept, **marks, "config": config, "run_config": run["config"], **other}


def ran(*results: dict) -> list[Line]:
    return [line for line in collect(results, CONFIG.tables) if line.runs]


def write(path: Path, content: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_report(runs: Path | list[Path], out: Path, readme: Path | None = None) -> list[Path]:
    places = [str(folder) for folder in (runs if isinstance(runs, list) else [runs])]
    return report(places, CONFIG.tables, CONFIG.sources, str(out), str(readme) if readme else None)


def test_results_are_found_at_any_depth_and_invalid_ones_are_reported_and_skipped(tmp_path, capsys):
    write(tmp_path / "a", result(seed=0))
    deep = write(tmp_path / "a" / "multirun" / "3", result(seed=1))
    for name, (content, reason) in {
        "broken": ('{"accuracy": 0.9', "it is broken"),
        "bytes": ("", "it is broken"),
        "foreign": ({"accuracy": 0.9}, "missing or invalid: dataset, method, way"),
        "list": ([1], "it is not a mapping"),
        "deep": ("[" * 100_000, "it is broken"),
        "nan": (result(ci95=float("nan")), "missing or invalid: ci95"),
        "typed": (result() | {"seed": "0"}, "missing or invalid: seed"),
        "train": (result() | {"config": {}}, "missing or invalid: config.train.episodes"),
        "curve": (result() | {"validations": [{"accuracy": 0.9}]}, "missing or invalid: validations"),
        "optional": (result() | {"machine": "abacus"}, "missing or invalid: machine"),
        "over": (result(accuracy=98.0), "its accuracy is 98.0, but must be between 0 and 1"),
        "under": (result(accuracy=-0.1), "its accuracy is -0.1"),
        "wide": (result(ci95=1.2), "its ci95 is 1.2, but must be between 0 and 1"),
        "inside out": (result(ci95=-0.01), "its ci95 is -0.01"),
        "one": (result(episodes=1), "its episodes is 1, but must be at least 2"),
        "back in time": (result(train_seconds=-3.0), "its train_seconds is -3.0"),
        "shot": (result() | {"shot": 0}, "its shot is 0"),
        "way": (result() | {"way": 20}, "its way is 20, but its config says 5"),
        "query": (result() | {"query": 1}, "its query is 1, but its config says 15"),
        "crowd": (result("glyphs/none_20way_1shot"), "its episodes have 20 classes, but its data only 12"),
        "many": (result(**{"train.way": 9000}), "train.way=9000, but its data have only 4112 training classes"),
        "seed": (result() | {"config": {**result()["config"], "seed": -1}}, "its config says seed=-1"),
        "no seed": (result() | {"config": {**result()["config"], "seed": "x"}}, "missing or invalid: config.seed"),
        "validated": (
            result() | {"validations": [{"trained_episodes": 1, "accuracy": 2.0}]},
            "its validations contain",
        ),
        "data": (result() | {"data": {"split": "vinyals"}}, "missing or invalid: data, with"),
    }.items():
        path = write(tmp_path / "b" / name, content)
        if name == "bytes":
            (path / "results.json").write_bytes(b"\xff\xfe\x00")
        find_results([path])
        line = capsys.readouterr().err
        assert line.startswith(f"skipped {path}/results.json: ") and reason in line and len(line.splitlines()) == 1
    found = read_results([str(tmp_path), str(deep / "results.json"), str(tmp_path / "none")])
    assert sorted(run["seed"] for run in found) == [0, 1]
    assert f"skipped {tmp_path / 'none'}: no such file or directory" in capsys.readouterr().err
    with pytest.raises(FewShotError, match=rf"no results\.json .*{tmp_path}/b"):
        read_results(str(tmp_path / "b"))


def test_results_without_a_record_of_data_or_best_weights_are_skipped(tmp_path, capsys):
    run = result()
    for name, (content, reason) in {
        "old": ({key: value for key, value in run.items() if key != "data"}, "older format: split unknown"),
        "last": (evaluation(run, 20, 1, weights="last"), "an evaluation of weights last"),
        "val": (evaluation(run, 20, 1, split="val"), "an evaluation on val classes"),
        "bare": (evaluation(run, 20, 1, run_config=None), "does not record the configuration of its run"),
    }.items():
        path = write(tmp_path / name, content)
        if name == "old":
            assert len(read_results(str(path))) == 1  # a figure may draw it
        else:  # does not count as the test of a run
            with pytest.raises(FewShotError, match=rf"none of the 1 results below {path} can be reported"):
                read_results(str(path))
            assert reason in capsys.readouterr().err
        with pytest.raises(FewShotError, match=rf"none of the 1 results below {path} can be reported"):
            read_results(str(path), known_data=True)
        line = capsys.readouterr().err
        assert line.startswith(f"skipped {path}/results.json: ") and reason in line and len(line.splitlines()) == 1
    write(tmp_path / "new", run)
    assert read_results(str(tmp_path), known_data=True) == [run]


def test_a_cell_has_a_line_for_each_setting_and_one_if_it_did_not_run(capsys):
    lines = collect(
        [
            result(seed=1, accuracy=0.98, ci95=0.003),
            result(seed=0, accuracy=0.99),
            result(seed=0, accuracy=0.99, overrides=["run_dir=copy"]),  # a copy
            result(seed=1) | {"seed": 7},  # a copy whose own seed contradicts its configuration
            result(budget="paper", **{"train.episodes": 60_000}),
            result("omniglot/maml_2nd_20way_5shot", accuracy=0.96, experiment=None),
            result("glyphs/none_2way_3shot", split=None),
            result(**{"choices.encoder": "resnet12", "method.encoder.filters": 9}, encoder="resnet12"),
        ],
        CONFIG.tables,
    )
    found = [line for line in lines if line.runs]
    assert [line.seeds for line in found] == [[0, 1], [0], [0], [0], [0]]
    assert (found[0].accuracies, found[0].ci95) == ([99, 98], 0.3)
    assert found[0].seeds_sd == pytest.approx(0.5**0.5) and found[1].seeds_sd is None
    assert found[0].references["published"] == Reference(98.8, "vinyals")
    assert [(line.number, line.total, line.trial) for line in found[:3]] == [(1, 2, False), (2, 2, True), (1, 1, False)]
    assert (found[1].settings, found[1].train["episodes"]) == ("paper", 60_000)
    assert (found[2].method, found[2].way, found[2].references["published"].accuracy) == ("MAML, 2nd order", 20, 98.9)
    assert [(line.dataset, line.method) for line in found[3:]] == [
        ("Other runs on glyphs", "none l2 conv4"),
        ("Other runs on omniglot", "protonet l2 resnet12"),
    ]
    assert len(lines) == 24 + 26 + 1 + 2  # both tables, a second setting, the runs that belong to no cell
    messages = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[2] for line in messages] == [
        f" tested 5-way 1-shot, seed {seed}, same settings" for seed in (0, 1)
    ]


def test_runs_on_a_gpu_have_lines_of_their_own_that_name_it(capsys):
    gpu = {"processor": "abacus", "threads": 16, "accelerator": "NVIDIA H100"}
    on_gpu = [result(seed=seed, machine=gpu) for seed in (0, 1)]
    lines = ran(result(seed=0), *on_gpu, evaluation(on_gpu[0], 5, 1, machine={"processor": "abacus"}))
    assert [(line.seeds, line.settings) for line in lines] == [
        ([0], "cpu"),
        ([0, 1], "cpu, machine.accelerator=NVIDIA H100"),
    ]
    assert lines[1].machine == "NVIDIA H100, abacus, 16 threads"
    assert "counted once" in capsys.readouterr().err  # the evaluation repeats the run's own test


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"split": "random"}, None),  # has a column, so it is not a trial
        ({"images": 40}, "data.images.train=164480"),
        ({"precision": "bf16-mixed", "hardware.precision": "bf16-mixed"}, "bf16-mixed"),
        ({"method.encoder.filters": 32, "encoder_parameters": 28_000}, "method.encoder.filters=32"),
        ({"train.query": 7}, "train.query=7"),
        ({"optimizer.name": "sgd"}, "optimizer.name=sgd"),  # keys of later versions count as well
        ({"val.every": 3}, "val.every=3"),
        ({"meta_batch": 4}, "meta_batch=4"),
        ({"batch_parts": 4}, "batch_parts=4"),
        ({"train.meta_batch": 4, "overrides": ["train.meta_batch=4"]}, "train.meta_batch=4"),
    ],
)
def test_runs_that_differ_in_more_than_their_seed_have_separate_lines(other, named):
    lines = ran(result(seed=0), result(seed=1, **other), result(seed=2))
    assert [line.seeds for line in lines] == [[0, 2], [1]]
    assert [line.trial for line in lines] == [False, named is not None]
    assert lines[0].settings == "cpu" and lines[1].settings.count(named or "cpu") == 1
    assert {"vinyals", other.get("split", "vinyals")} == {line.split for line in lines}


def test_paths_and_hardware_make_no_difference():
    paths = {"dataset.source.data_dir": "there", "data_dir": "there", "cache_dir": "x", "run_dir": "y"}
    elsewhere = {"hardware.accelerator": "gpu", "log_every": 1, "pictures": False, "method.task_batching": "vmap"}
    new = {"method.clip_norm": None, "encoder.signed": False}  # keys that older versions do not have
    assert len(by_settings([result(seed=0), result(seed=1, **paths), result(seed=2, **elsewhere, **new)])) == 1


def test_a_line_names_what_it_switched_off():
    on, off, null = ({"optimizer.nesterov": value} for value in (True, False, None))
    for first, second, named in ((on, off, "false"), (off, on, "true"), (on, {}, "unset"), (on, null, "unset")):
        lines = ran(result(seed=0, **first), result(seed=0, **second))
        assert [line.settings for line in lines] == ["cpu", f"cpu, optimizer.nesterov={named}"]


def test_an_evaluation_adds_a_line_only_to_other_cells(capsys):
    runs = [result(seed=seed, **{"train.way": 60, "meta_batch": 1}) for seed in (0, 1)]
    found = [evaluation(run, way, shot) for run in runs for way, shot in ((5, 1), (20, 1))]
    found[0]["episodes"] = 10_000  # same task, more episodes
    lines = ran(*found, *runs)
    assert [(line.way, line.shot, line.seeds, line.chosen_at) for line in lines] == [
        (5, 1, [0, 1], ""),
        (20, 1, [0, 1], "5-way 1-shot"),
    ]
    assert len(capsys.readouterr().err.splitlines()) == 2
    row = next(row for row in markdown(lines, CONFIG.sources).splitlines() if "20-way" in row)
    assert "| 60-way 1-shot, 4,000 episodes, chosen at 5-way 1-shot, 10 min |" in row
    assert len(ran(*found[:2])) == 2  # without the run's own result
    own = result("omniglot/protonet_20way_1shot", **{"train.way": 60})
    assert [line.chosen_at for line in ran(found[1], own)] == ["", "5-way 1-shot"]
    other = evaluation(runs[0], 20, 1, precision="bf16-mixed")
    assert "train.precision=32-true" in ran(found[1], other)[1].settings


def test_overrides_are_listed_unless_another_column_shows_them():
    overrides = [f"experiment={CELL}", "budget=cpu", "seed=1", "resume=auto", "hydra.run.dir=x", "train.query=9"]
    (line,) = ran(result(overrides=overrides))
    assert line.settings == "cpu, train.query=9"
    overrides[0] = "+experiment/omniglot=protonet_5way_1shot"
    (line,) = ran(result(overrides=[*overrides[:-1], "method=protonet", "way=5", "dataset.source.split=vinyals"]))
    assert line.settings == "cpu"


def test_accuracies_are_compared_only_on_the_same_split():
    lines = ran(
        result(accuracy=0.95, machine={"processor": "an | <abacus>\nof wood"}),
        result("omniglot/protonet_20way_1shot", accuracy=0.999, split="lake"),
        result("omniglot/maml_2nd_5way_1shot", accuracy=0.9865, split="random"),  # within the interval
        result("miniimagenet/protonet_5way_5shot", accuracy=0.6, split=None),
    )
    assert [line.split for line in lines] == ["vinyals", "lake", "random", "ravi"]
    assert [[key for key in REFERENCES if line.compares(key)] for line in lines] == [
        ["published", "others"],
        ["article"],
        ["published"],
        ["published", "others"],
    ]
    text = markdown(lines, CONFIG.sources)
    printed, _, article = (row for row in text.splitlines() if row.startswith("Compared with *"))
    assert "within the interval: MAML, 2nd order, 5-way 1-shot on Omniglot. Below: Prototypical networks, 5" in printed
    assert "20-way" not in printed and "within the interval: Prototypical networks, 20-way 1-shot on Omn" in article
    assert "Machine 1: an \\| &lt;abacus&gt;\\\\nof wood." in text
    # Files with a different split.
    own = result("miniimagenet/protonet_5way_5shot", split=None)
    own["data"]["classes"] = {"train": 60, "val": 20, "test": 20}
    assert [line.split for line in ran(own)] == [""]


def test_a_line_names_the_command_that_measures_it_again():
    def commands(*found):
        return [line.command for line in collect(list(found), CONFIG.tables) if line.runs]

    own = result("omniglot/maml_1st_20way_5shot", seed=3)
    trained = "train experiment=omniglot/maml_1st way=20 shot=5 budget=cpu seed=3"
    assert commands(own) == [trained]
    assert commands(evaluation(own, 5, 1)) == [f"{trained}, then evaluate checkpoint=RUN_DIR way=5 shot=1"]
    assert commands({**own, "overrides": ["seed=3", "train.episodes=9"]}) == [
        trained.replace("seed", "train.episodes=9 seed")
    ]
    assert commands({**own, "experiment": None}) == [""]


def test_a_model_is_described_by_the_command_in_its_card(tmp_path):
    """The experiment may have changed since the training, and with it what its overrides mean."""
    own = result("omniglot/maml_1st_20way_5shot", seed=3) | {"overrides": ["seed=3"]}
    command = "fewshot train experiment=omniglot/maml_1st way=20 shot=5 seed=3 method.inner_steps=9"
    card = write(tmp_path / "omniglot" / "cell" / "3", own) / "card.json"
    card.write_text(json.dumps({"command": command}))
    write_report(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| cpu, method.inner_steps=9 |" in text and "| reproduce omniglot/cell/3 |" in text
    card.write_text("[")
    write_report(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "inner_steps=9" not in text and "| train experiment=omniglot/maml_1st way=20 shot=5 " in text


def test_the_report_compares_results_and_leaves_cells_without_runs_empty(tmp_path):
    write(tmp_path / "runs" / "x", result(seed=0, accuracy=0.99))
    write(tmp_path / "runs" / "y", result(seed=3, accuracy=0.98))
    write(tmp_path / "runs" / "z", result("miniimagenet/protonet_5way_5shot", split=None, accuracy=0.6, machine=None))
    text, table, picture, curves = write_report(tmp_path / "runs", tmp_path / "new" / "out")
    rows = [row for row in text.read_text().splitlines() if row.startswith("| ") and "method" not in row]
    others = "98.8 (vinyals) | 98.4 (vinyals) | 98.2 (lake)"
    ours = (
        "98.50 ± 0.20 (vinyals) | 0.71 (98.00 to 99.00) | 0, 3 | 1,000 | 5-way 1-shot, 4,000 episodes, 10 min | cpu | 1"
        " | train experiment=omniglot/protonet way=5 shot=1 budget=cpu seed=0"
    )
    assert rows[1] == f"| Prototypical networks | 5-way 1-shot | {others} | {ours} |"
    assert rows[2].endswith("| 99.7 (vinyals) | 99.6 (vinyals) | 99.4 (lake) |  |  |  |  |  |  |  |  |")
    assert (
        "| 60.00 ± 0.20 (ravi) |  | 0 | 1,000 | 5-way 5-shot, 4,000 episodes, 10 min | cpu |  | train experiment="
        in text.read_text()
    )
    assert "Machine 1: abacus, 2 threads." in text.read_text()
    with table.open() as file:
        values = list(csv.DictReader(file))
    assert len(values) == 24 + 26
    assert (values[0]["ours"], values[0]["lowest"], values[0]["seeds"]) == ("98.5", "98.0", "0 3")
    assert (values[0]["split"], values[0]["article_split"], values[0]["encoder_parameters"]) == (
        "vinyals",
        "lake",
        "111936",
    )
    assert values[1]["published"] == "99.7" and not values[1]["ours"]
    # About the width of a page.
    assert [Image.open(path).width for path in (picture, curves)] == [990, 990]


def test_every_cell_with_a_training_curve_has_a_panel(tmp_path, monkeypatch):
    curve = [{"trained_episodes": 10 * step, "accuracy": 0.9 + step / 100} for step in range(1, 5)]
    short = result(accuracy=0.95, validations=curve)
    lines = ran(
        short,
        result(seed=1, accuracy=0.96, validations=curve),
        result(accuracy=0.99, **{"train.way": 9}),
        evaluation(short, 20, 1),
    )
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw_curves(lines, tmp_path / "curves.png")
    (panel,) = figures[0].axes  # the evaluated run was validated on a different task
    assert panel.get_title() == "Prototypical networks\nOmniglot, 5-way 1-shot"
    references = ["printed, vinyals", "others, vinyals", "article, lake"]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [
        *references,
        "ours (1), vinyals",
        "ours (2), vinyals",
    ]
    drawn = [line.get_xydata().tolist() for line in panel.lines]
    assert drawn.count([[10 * step, 90 + step] for step in range(1, 5)]) == 2
    assert [[40, 95]] in drawn and [[40, 96]] in drawn  # the test, at the best validation
    draw_curves(ran(evaluation(short, 20, 1)), tmp_path / "curves.png")
    assert not figures[1].axes
    assert "no training curves" in figures[1].texts[0].get_text()


def test_figures_with_long_names_and_many_trials_are_legible(tmp_path):
    tables = OmegaConf.to_container(CONFIG.tables)
    tables["omniglot"]["methods"]["protonet"]["title"] = "Prototypical networks with $everything^ " + "and more " * 20
    tables["omniglot"]["title"] = "A data set of a very long name " * 5
    curve = [{"trained_episodes": 250_000 * step, "accuracy": 1 - 0.9 / 9**step} for step in range(1, 7)]
    found = [result(accuracy=1.0, ci95=0.0, seed=seed) for seed in range(5)]
    for trial in range(17):
        split = ("vinyals", "random", "lake", "a split of $one's own $x^ with a long name", None)[trial % 5]
        more = {"train.query": trial, "method.encoder.filters": trial}
        found += [result(accuracy=1 - 0.9**trial, ci95=0.4, split=split, validations=curve, **more)]
    found += [result(f"omniglot/maml_{order}_20way_5shot", accuracy=0.0) for order in ("1st", "2nd")]
    found += [result("miniimagenet/matching_fce_scaled_cosine_5way_1shot", split=None, validations=[])]
    found += [
        result(
            "glyphs/" + "long_" * 30 + "_5way_1shot",
            method="method_of_a_very_long_name_" * 9,
            validations=curve,
            split=None,
        )
    ]
    for number, run in enumerate(found):
        write(tmp_path / "runs" / str(number), run)
    report(str(tmp_path / "runs"), OmegaConf.create(tables), CONFIG.sources, str(tmp_path / "out"), None)


def test_only_the_text_between_the_markers_of_a_page_changes(tmp_path):
    write(tmp_path / "runs", result(accuracy=1.0))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{OPENING}\nold | text\n{CLOSING}\nafter\n")
    for _ in range(2):  # the second time changes nothing
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


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file or directory; name a Markdown file"), (b"\xff", "can't decode"), (b"# Results", "add them")],
)
def test_without_a_page_to_write_to_nothing_is_written(tmp_path, content, message):
    write(tmp_path / "runs", result())
    page = tmp_path / "page.md"
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(FewShotError, match=message) as caught:
        write_report(tmp_path / "runs", tmp_path / "out", page)
    assert str(page) in str(caught.value) and not (tmp_path / "out").exists()


def test_the_guide_shows_the_committed_results(tmp_path):
    results, page = ROOT / "notebooks" / "results" / "reproduction", ROOT / "notebooks" / "guides" / "reproduce.md"
    runs = [results / "omniglot", results / "miniimagenet"]  # as make report does
    between = page.read_text().partition(OPENING)[2].partition(CLOSING)[0].strip()
    found = find_results(runs).values()
    if not any("data" in result for result in found):  # all are in an older format
        assert not between
        return
    copy = shutil.copy(page, tmp_path / page.name)
    write_report(runs, tmp_path, copy)
    written = Path(copy).read_text().partition(OPENING)[2].partition(CLOSING)[0].strip()
    assert re.sub(r"\]\((\w+\.png)\)", r"](../results/reproduction/\1)", written) == between


def test_the_command_takes_paths_first_and_leaves_no_files_in_the_working_directory(cli, tmp_path):
    here = tmp_path / "elsewhere"
    odd = write(here / "it's {odd}, a=b", result())
    write(tmp_path / "more", result(seed=1))
    (tmp_path / "page.md").write_text(f"{OPENING}\n{CLOSING}")
    arguments = (odd.name, tmp_path / "more", f"out={tmp_path / 'out'}", f"readme={tmp_path / 'page.md'}")
    done = cli(*arguments, script="report.py", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "| 0.00 (99.00 to 99.00) | 0, 1 |" in (tmp_path / "page.md").read_text()
    assert [path.name for path in here.iterdir()] == [odd.name]
    wrong = cli(tmp_path / "out", script="report.py")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no results.json") and len(wrong.stderr.splitlines()) == 1
    assert "# python src/report.py RUNS..." in cli("--help", script="report.py").stdout


def test_only_leading_arguments_may_omit_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    for typed, expected in {
        ("x",): ["runs=['x']"],
        ("x", "a=b", "out=y"): ["runs=['x','a=b']", "out=y"],
        ("out=y", "--cfg", "job"): ["out=y", "--cfg", "job"],
        ("--help",): ["--help"],
        (): [],
    }.items():
        arguments = ["program", *typed]
        command_line.name_leading("runs", arguments)
        assert arguments[1:] == expected
