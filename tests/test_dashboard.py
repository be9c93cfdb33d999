import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from conftest import free_port, wait_for
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir) -> Path:
    """A directory of three small runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in METHODS.items():
        train(compose(*TINY, *overrides, f"run_dir={folder / name}", f"cache_dir={cache_dir}"))
    return folder


def log_of(run: Path) -> EventAccumulator:
    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    log.Reload()
    return log


def hyperparameters(run: Path) -> dict:
    content = log_of(run).summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


def test_hyperparameters_describe_a_run(runs):
    common = {"dataset": "glyphs", "encoder": "conv4", "optimizer": "adam", "seed": 7, "other": ""}
    expected = {
        "protonet": {
            "method": "protonet",
            "distance": "l2",
            "way": 5,
            "shot": 1,
            "schedule": "halving",
            "learning_rate": 0.001,
        },
        "matching": {
            "method": "matching",
            "distance": "cosine",
            "way": 5,
            "shot": 2,
            "schedule": "none",
            "learning_rate": 0.001,
        },
        "maml": {"method": "maml", "distance": "none", "way": 5, "shot": 1, "schedule": "none", "learning_rate": 0.01},
    }
    for name, own in expected.items():
        assert hyperparameters(runs / name) == common | own
    log = log_of(runs / "protonet")
    content = log.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    assert [metric.name.tag for metric in experiment.metric_infos] == ["val/best_accuracy", "test/accuracy"]


def test_scalars_are_grouped_and_the_best_validation_is_that_of_the_tested_weights(runs):
    log = log_of(runs / "maml")
    tags = {"loss", "accuracy", "learning_rate"}
    measured = {"val/accuracy", "val/ci95", "val/best_accuracy", "test/accuracy", "test/ci95"}
    assert set(log.Tags()["scalars"]) == {f"train/{tag}" for tag in tags} | measured
    assert [event.value for event in log.Scalars("train/learning_rate")] == pytest.approx([0.01])
    (best,) = log.Scalars("val/best_accuracy")
    assert best.value == max(event.value for event in log.Scalars("val/accuracy"))


def test_pictures_are_drawn_at_the_test_and_only_if_requested(runs, tmp_path, cache_dir):
    for name in METHODS:
        images = log_of(runs / name).Tags()["images"]
        assert sorted(images) == ["test/classes", "test/episode"]
        assert (runs / name / "tensorboard" / "projector_config.pbtxt").exists() == (name != "maml")
    folder = runs / "protonet" / "tensorboard" / "00000" / "test_classes"
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    assert points.shape == (200, 8)
    assert len(set((folder / "metadata.tsv").read_text().splitlines())) == 20
    assert Image.open(folder / "sprite.png").size == (15 * 28, 15 * 28)
    train(compose(*TINY, "pictures=false", f"run_dir={tmp_path}", f"cache_dir={cache_dir}"))
    assert not log_of(tmp_path).Tags()["images"] and not list(tmp_path.rglob("*.tsv"))


def test_a_repeated_test_logs_everything_once(runs, tmp_path, cache_dir):
    shutil.copytree(runs / "protonet", tmp_path / "run")
    own = [f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}", "resume=auto", "test.episodes=6"]
    train(compose(*TINY, *METHODS["protonet"], *own))
    log = log_of(tmp_path / "run")
    for tag in ("test/accuracy", "val/best_accuracy", "val/accuracy", "train/loss"):
        steps = [event.step for event in log.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag
    assert len(log.Images("test/episode")) == 1
    assert (tmp_path / "run" / "tensorboard" / "projector_config.pbtxt").read_text().count("tensor_path") == 1


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

    shown("timeseries", "protonet/tensorboard", "maml/tensorboard", "test", "train", "val")
    shown("hparams", "protonet", "matching", "maml", "distance", "cosine", "way", "val/best_accuracy", "test/accuracy")
    shown("images", "test/episode", "test/classes", images=2)
    shown("projector", "test_classes:00000", "PCA")
