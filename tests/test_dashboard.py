import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.plugins.hparams import metadata

from conftest import free_port, log_of, wait_for
from fewshot.config import compose
from fewshot.training import train

TINY = [
    "train.episodes=4",
    "train.way=5",
    "train.query=1",
    "query=3",
    "val.every=2",
    "val.episodes=3",
    "test.episodes=5",
    "encoder.filters=8",
    "hardware=cpu",
    "log_every=1",
]
METHODS = {
    "protonet": ["method=protonet", "way=5", "seed=7"],
    "matching": ["method=matching", "distance=cosine", "shot=2", "seed=7"],
    "maml": ["method=maml", "optimizer.lr=0.01", "seed=7"],
}
NAMES = {
    "protonet": "protonet-l2-5way-1shot-seed7",
    "matching": "matching-cosine-5way-2shot-seed7",
    "maml": "maml-5way-1shot-seed7",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir) -> Path:
    """A directory of three small runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in METHODS.items():
        train(compose(*TINY, *overrides, f"run_dir={folder / name}", f"cache_dir={cache_dir}"))
    return folder


def hyperparameters(run: Path) -> dict:
    content = log_of(run).summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


def test_hyperparameters_describe_a_run(runs):
    common = {"dataset": "glyphs", "encoder": "conv4", "optimizer": "adam", "seed": "7", "other": ""}
    expected = {
        "protonet": {
            "method": "protonet",
            "distance": "l2",
            "way": "5",
            "shot": "1",
            "schedule": "halving",
            "learning_rate": 0.001,
        },
        "matching": {
            "method": "matching",
            "distance": "cosine",
            "way": "5",
            "shot": "2",
            "schedule": "none",
            "learning_rate": 0.001,
        },
        "maml": {
            **{"method": "maml", "distance": "none", "way": "5", "shot": "1", "schedule": "none"},
            "learning_rate": 0.01,
        },
    }
    for name, own in expected.items():
        measured = json.loads((runs / name / "results.json").read_text())
        best = max(measured["validations"], key=lambda point: point["accuracy"])
        accuracies = {
            f"{column} accuracy, %": f"{100 * point['accuracy']:.2f} ± {100 * point['ci95']:.2f}"
            for column, point in (("2 val", best), ("3 test", measured))
        }
        assert hyperparameters(runs / name) == common | own | accuracies
    log = log_of(runs / "protonet")
    content = log.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    assert {metric.name.tag: metric.display_name for metric in experiment.metric_infos} == {
        "2 val/best_accuracy": "validation accuracy",
        "2 val/best_ci95": "validation ±",
        "3 test/accuracy": "test accuracy",
        "3 test/ci95": "test ±",
    }
    assert set(log.Tags()["scalars"]) >= {metric.name.tag for metric in experiment.metric_infos}


def test_scalars_are_grouped_and_the_best_validation_is_that_of_the_tested_weights(runs):
    log = log_of(runs / "maml")
    assert set(log.Tags()["scalars"]) == {
        *("1 train/loss", "1 train/accuracy", "1 train/learning_rate"),
        *("2 val/accuracy", "2 val/ci95", "2 val/best_accuracy", "2 val/best_ci95"),
        *("3 test/accuracy", "3 test/ci95"),
    }
    assert [event.value for event in log.Scalars("1 train/learning_rate")] == pytest.approx([0.01])
    (best,) = log.Scalars("2 val/best_accuracy")
    assert best.value == max(event.value for event in log.Scalars("2 val/accuracy"))


def test_pictures_are_drawn_at_the_test_and_only_if_requested(runs, tmp_path, cache_dir):
    for name in METHODS:
        images = log_of(runs / name).Tags()["images"]
        assert sorted(images) == ["3 test/classes", "3 test/episode"]
        assert (runs / name / NAMES[name] / "projector_config.pbtxt").exists() == (name != "maml")
    folder = runs / "protonet" / NAMES["protonet"] / "00000" / "test_classes"
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert points.shape == (200, 8)
    assert len(set((folder / "metadata.tsv").read_text().splitlines())) == 20
    sprite = Image.open(folder / "sprite.png")
    assert sprite.size == (15 * 34, 15 * 34)  # each image in a frame of 3 pixels
    frames = [sprite.getpixel((34 * (number % 15), 34 * (number // 15))) for number in range(200)]
    assert len(set(frames)) == 20 and all(len(set(frames[start : start + 10])) == 1 for start in range(0, 200, 10))
    train(compose(*TINY, "pictures=false", f"run_dir={tmp_path}", f"cache_dir={cache_dir}"))
    assert not log_of(tmp_path).Tags()["images"] and not list(tmp_path.rglob("*.tsv"))


def test_a_repeated_test_logs_everything_once(runs, tmp_path, cache_dir):
    shutil.copytree(runs / "protonet", tmp_path / "run")
    own = [f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}", "resume=auto", "test.episodes=6"]
    train(compose(*TINY, *METHODS["protonet"], *own))
    log = log_of(tmp_path / "run")
    for tag in ("3 test/accuracy", "2 val/best_accuracy", "2 val/accuracy", "1 train/loss"):
        steps = [event.step for event in log.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag
    assert len(log.Images("3 test/episode")) == 1
    assert (tmp_path / "run" / NAMES["protonet"] / "projector_config.pbtxt").read_text().count("tensor_path") == 1


def visible_text(browser) -> str:
    """All text of the page, including custom elements and frames."""
    return browser.execute_script("""
        const texts = [];
        const walk = node => {
            if (node.shadowRoot) walk(node.shadowRoot);
            if (node.contentDocument?.body) walk(node.contentDocument.body);
            for (const child of node.childNodes) {
                if (child.nodeType === Node.TEXT_NODE) texts.push(child.textContent.trim());
                else if (!["SCRIPT", "STYLE"].includes(child.tagName)) walk(child);
            }
        };
        walk(document.body);
        return texts.join("\\n");
    """)


def pictures(browser) -> int:
    """The number of logged images that the page shows."""
    return browser.execute_script("""
        let count = 0;
        const walk = node => {
            if (node.shadowRoot) walk(node.shadowRoot);
            for (const child of node.children || []) {
                if (child.tagName === "IMG" && child.naturalWidth > 100) count++;
                walk(child);
            }
        };
        walk(document.body);
        return count;
    """)


@pytest.fixture
def board(runs):
    """The URL of a TensorBoard that shows the runs."""
    port = free_port()
    command = ["-m", "tensorboard.main", "--logdir", str(runs), "--host", "localhost", "--port", str(port)]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        wait_for(port)
        yield f"http://localhost:{port}"
        server.terminate()


@pytest.mark.slow
def test_the_dashboard_shows_scalars_hyperparameters_and_pictures(browser, board):
    def shown(tab: str, *texts: str, images: int = 0) -> None:
        browser.get("about:blank")
        browser.get(f"{board}/#{tab}")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            page = visible_text(browser)
            if all(text in page for text in texts) and pictures(browser) >= images:
                return
            time.sleep(0.5)
        pytest.fail(f"{tab} lacks {[text for text in texts if text not in page]} or pictures:\n{page}")

    shown("timeseries", *(f"{run}/{name}" for run, name in NAMES.items()), "1 train", "2 val", "3 test")
    shown("hparams", "protonet", "matching", "maml", "way", "validation accuracy", "test accuracy", "test ±")
    shown("images", "3 test/episode", "3 test/classes", images=2)
    shown("projector", "test_classes:00000", "PCA")
