"""A package outside fewshot with its own methods, data set, encoder, optimizer and logger."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
CONF = HERE / "someones" / "conf"
CHOSEN = ["dataset=stripes", "encoder=rows", "optimizer=signs", "logger=lines", "method=ridge"]
TINY = [
    *("hardware=cpu", "way=2", "query=2", "train.episodes=2", "val.episodes=2", "test.episodes=2", "pictures=false"),
    *("train.way=2", "train.query=2", "log_every=1"),
]


@pytest.fixture(scope="module")
def call(cli):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    return lambda *given, **named: cli(*given, env=environment, **named)


@pytest.fixture(scope="module")
def run(call, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("life") / "run"
    done = call("--config-dir", CONF, *CHOSEN, *TINY, f"hydra.run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def test_it_trains_with_all_of_its_parts(run):
    results = json.loads((run / "results.json").read_text())
    assert [results[part] for part in ("dataset", "encoder", "optimizer", "method")] == [
        "stripes",
        "rows",
        "signs",
        "ridge",
    ]
    assert "test/accuracy" in (run / "log.txt").read_text()


def test_it_resumes(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    done = call("--config-dir", CONF, f"resume={tmp_path / 'run'}", "logger=lines", "train.episodes=4")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["optimizer"] == "signs" and results["config"]["train"]["episodes"] == 4
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.startswith((run / "log.txt").read_text()) and log.count("test/accuracy") == 2


def test_a_sweep_finds_it_on_the_search_path(call, tmp_path):
    others = [choice for choice in CHOSEN if not choice.startswith("method")]
    search = ["hydra.searchpath=[pkg://someones.conf]", f"hydra.sweep.dir={tmp_path}"]
    done = call("-m", *search, *others, *TINY, "method=pairs,centred")
    assert done.returncode == 0, done.stderr
    methods = [json.loads((tmp_path / job / "results.json").read_text())["method"] for job in "01"]
    assert methods == ["pairs", "centred"]


@pytest.mark.slow
def test_evaluate_needs_its_configuration_or_trust(run, call, tmp_path):
    accuracy = json.loads((run / "results.json").read_text())["accuracy"]
    asked = [f"checkpoint={run}", "hardware=cpu"]
    done = call(*asked, f"out={tmp_path / 'no'}", script="evaluate.py")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "trust=someones" in done.stderr and "--config-dir" in done.stderr and "broken" not in done.stderr
    for number, way in enumerate((["--config-dir", CONF], ["trust=someones"])):
        done = call(*way, *asked, f"out={tmp_path / str(number)}", script="evaluate.py")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / str(number) / "results.json").read_text())["accuracy"] == accuracy


def test_predict(run, call, tmp_path):
    random = np.random.default_rng(0)
    for folder in ("support/a", "support/b", "query"):
        (tmp_path / folder).mkdir(parents=True)
        pixels = random.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / "one.png")
    asked = [f"checkpoint={run}", "support=support", "query=query", "out=predicted", "trust=someones"]
    done = call(*asked, script="predict.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "predicted" / "predictions.csv").read_text().splitlines()) == 2


def test_export(run, call, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} of the extra export is not installed")
    done = call(f"checkpoint={run}", "trust=someones", f"out={tmp_path / 'rows.onnx'}", script="export.py")
    assert done.returncode == 0 and (tmp_path / "rows.onnx").exists(), done.stderr


def test_an_option_that_the_package_has_as_well_is_not_shadowed_silently(call, tmp_path):
    (tmp_path / "method").mkdir()
    shutil.copy(Path(CONF) / "method" / "ridge.yaml", tmp_path / "method" / "r2d2.yaml")
    done = call("--config-dir", str(tmp_path), "method=r2d2", *TINY)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(r"method=r2d2 is in .*conf and in .*, and only the first is read; rename yours", done.stderr)


def test_help_and_suggestions_know_its_options(call):
    shown = call("--config-dir", CONF, "method=ridge", "--help").stdout
    listed = next(line for line in shown.splitlines() if line.startswith("# method=")).removeprefix("# method=")
    assert {"protonet", "r2d2", "ridge", "pairs", "centred"} <= set(listed.split("|"))
    assert "penalty: 1.0  # of the weights' squares" in shown
    done = call("--config-dir", CONF, "method=piars", "encoder=rows")
    assert done.returncode == 1 and "did you mean pairs?" in done.stderr
    done = call("--config-dir", CONF, "method=ridge", "method.penalti=2")
    assert done.returncode == 1 and "did you mean method.penalty?" in done.stderr
