"""Each logger gets the same scalars, the configuration and, if supported, pictures; resuming continues its log."""

import csv
import json
import sqlite3
import time

import pytest
import pytorch_lightning as pl
import torch
import yaml
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger

from conftest import log_of
from fewshot.config import compose
from fewshot.errors import FewShotError
from fewshot.loggers import CSV, open_loggers, parts
from fewshot.runs import load_for_resume
from fewshot.training import train

TINY = [
    *("train.episodes=4", "train.way=5", "train.query=1", "query=3", "val.every=2", "val.episodes=3"),
    *("test.episodes=5", "encoder.filters=8", "hardware=cpu", "log_every=1", "checkpoint_every=2"),
    *("dataset.source.samples=4", "pictures=false"),  # quick to draw
]
MEASURED = {
    *("train/loss", "train/accuracy", "train/learning_rate", "val/accuracy", "val/ci95", "val/best_accuracy"),
    "val/best_ci95",
    *("test/accuracy", "test/ci95"),
}


class Counting(pl.Callback):
    """A user-supplied callback."""

    steps = 0

    def on_train_batch_end(self, *_):
        type(self).steps += 1


@pytest.fixture
def run(tmp_path, cache_dir):
    def train_with(name, *overrides):
        return train(compose(*TINY, f"run_dir={tmp_path / name}", f"cache_dir={cache_dir}", *overrides))

    return train_with


def table(run_dir):
    """The values of each tag in the order of their steps, from metrics.csv."""
    found = {}
    with (run_dir / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for tag, value in row.items():
                if value:
                    found.setdefault(tag, []).append((step, pytest.approx(float(value), rel=1e-5)))
    return found


def test_every_logger_gets_the_same_scalars_and_the_configuration(run, tmp_path):
    run("board"), run("table", "logger=csv"), run("none", "logger=none", "train.episodes=2")
    log = log_of(tmp_path / "board")
    tags = {tag.partition(" ")[2]: tag for tag in log.Tags()["scalars"]}
    board = {name: [(event.step, event.value) for event in log.Scalars(tag)] for name, tag in tags.items()}
    assert set(board) == MEASURED
    assert table(tmp_path / "table") == board
    for log in ("board/protonet-l2-5way-1shot-seed0", "table/csv"):
        settings = yaml.safe_load((tmp_path / log / "hparams.yaml").read_text())
        assert settings["encoder"]["filters"] == 8 and "logger" not in settings
    assert {path.name for path in (tmp_path / "none").iterdir()} == {
        *(".lock", "checkpoints", "classes.json", "episodes.csv", "results.json")
    }


def test_a_resumed_run_adds_to_its_table(run, tmp_path):
    run("whole", "logger=csv"), run("resumed", "logger=csv", "train.episodes=2")
    run("resumed", "logger=csv", "resume=auto")
    assert table(tmp_path / "resumed") == table(tmp_path / "whole")
    header, *rows = (tmp_path / "resumed" / "csv" / "metrics.csv").read_text().splitlines()
    assert "step" in header and len(rows) == len((tmp_path / "whole/csv/metrics.csv").read_text().splitlines()) - 1


def test_a_checkpoint_chooses_neither_logger_nor_callbacks(run, tmp_path, capsys):
    run("run", "logger=csv")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert not {"logger", "callbacks"} & set(checkpoint["hyper_parameters"])
    checkpoint["hyper_parameters"] |= {
        "logger": {"_target_": "os.system", "command": "touch canary"},
        "callbacks": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(tmp_path / "elsewhere")},
    }
    torch.save(checkpoint, path)
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("- logger=csv\n- logger=$(reboot)\n- seed=0\n")
    config, _ = load_for_resume(compose(*TINY, f"run_dir={tmp_path / 'run'}", f"resume={tmp_path / 'run'}"))
    assert config.logger._target_ == "fewshot.loggers.TensorBoard" and config.callbacks is None
    assert config.logger.save_dir == str(tmp_path / "run")
    shown = capsys.readouterr().out
    assert "started with logger=csv, but this command was not" in shown and "reboot" not in shown
    config, _ = load_for_resume(
        compose(*TINY, f"run_dir={tmp_path / 'run'}", f"resume={tmp_path / 'run'}", "logger=csv")
    )
    assert config.logger._target_ == "fewshot.loggers.CSV" and not capsys.readouterr().out


def test_user_supplied_callbacks_and_several_loggers_work_together(tmp_path, cache_dir):
    config = compose(*TINY, f"run_dir={tmp_path}", f"cache_dir={cache_dir}")
    config.callbacks = {"mine": {"_target_": "test_loggers.Counting"}}
    config.logger = {
        "table": OmegaConf.to_container(compose("run_dir=x", "logger=csv").logger) | {"save_dir": str(tmp_path)},
        "another": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(tmp_path), "version": "plain"},
    }
    Counting.steps = 0
    train(config)
    assert Counting.steps == 4
    assert (tmp_path / "csv/metrics.csv").exists() and (tmp_path / "lightning_logs/plain/metrics.csv").exists()


def test_a_training_that_a_callback_ends_counts_its_episodes(tmp_path, cache_dir):
    config = compose(*TINY, f"run_dir={tmp_path}", f"cache_dir={cache_dir}", "logger=none")
    config.callbacks = {
        "_target_": "pytorch_lightning.callbacks.EarlyStopping",
        **{"monitor": "val/accuracy", "mode": "max", "stopping_threshold": 0.0},
    }
    train(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["train_episodes_per_second"] == pytest.approx(2 / results["train_seconds"])


@pytest.mark.parametrize(
    ("node", "line"),
    [
        ({"_target_": "pytorch_lightning.Callback"}, "is not a logger of Lightning"),
        ({"_target_": "fewshot.loggers.CSV"}, "logger=fewshot.loggers.CSV cannot be made: .*save_dir"),
        ({"one": 3}, r"logger\.one has no _target_"),
        ({"save_dir": "x"}, r"logger\.save_dir has no _target_"),
    ],
)
def test_what_is_not_a_logger_is_named(node, line):
    with pytest.raises(FewShotError, match=line), open_loggers(OmegaConf.create({"logger": node})):
        pass


def test_a_missing_package_is_named(monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setattr(f"pytorch_lightning.loggers.{name}._{name.upper()}_AVAILABLE", False)
        config = compose("run_dir=x", f"logger={name}")
        with pytest.raises(FewShotError, match=rf"needs the package {name}: pip install -e '\.\[{name}\]'"):
            open_loggers(config).__enter__()


def test_parts():
    assert parts("logger", None) == []
    two = OmegaConf.create({"a": {"_target_": "x"}, "b": None, "c": {"_target_": "y"}})
    assert [name for name, _ in parts("callbacks", two)] == ["callbacks.a", "callbacks.c"]
    assert issubclass(CSV, CSVLogger)


def leveldb_records(log, offset):
    """The records of a LevelDB log, whose first block begins before the log by some offset."""
    position, record = 0, b""
    while position + 7 <= len(log):
        left = 32768 - (position + offset) % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def logged_by_wandb(folder):
    """The tags and the configuration in an offline log."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("*.wandb")

    def read():
        return [messages.Record.FromString(content) for content in leveldb_records(path.read_bytes()[7:], 7)]

    records, until = read(), time.monotonic() + 60
    while not any(record.HasField("exit") for record in records) and time.monotonic() < until:
        time.sleep(0.1)  # another process writes the log, and may be late
        records = read()
    tags, settings = set(), {}
    for record in records:
        tags |= {(item.nested_key or [item.key])[0] for item in record.history.item}
        for part in (record.run.config, record.config):
            settings |= {item.key: json.loads(item.value_json) for item in part.update}
    return tags, settings


def test_weights_and_biases_offline(run, tmp_path):
    pytest.importorskip("wandb", reason="pip install 'fewshot[wandb]'")
    run("run", "logger=wandb", "train.episodes=2", "pictures=true")
    folder = tmp_path / "run" / "wandb"
    (first,) = folder.glob("offline-run-*")
    run_id = first.name.rpartition("-")[2]
    pictures = {path.name.partition("_")[0] for path in first.rglob("*.png")}
    assert pictures == {"episode", "classes"}
    tags, settings = logged_by_wandb(first)
    assert tags & {*MEASURED, "test/episode", "test/classes"} == {*MEASURED, "test/episode", "test/classes"}
    assert settings["encoder"]["filters"] == 8 and settings["method"]["distance"]["scale"] == 1
    run("run", "logger=wandb", "resume=auto")
    ids = {path.name.rpartition("-")[2] for path in folder.glob("offline-run-*")}
    assert ids == {run_id}  # wandb sync puts both attempts into one run
    run("other", "logger=wandb")  # in the same process, as in a sweep
    (other,) = (tmp_path / "other" / "wandb").glob("offline-run-*")
    assert not other.name.endswith(run_id)


def test_mlflow_in_the_directory_of_the_run(run, tmp_path):
    pytest.importorskip("mlflow", reason="pip install 'fewshot[mlflow]'")
    run("run", "logger=mlflow", "train.episodes=2", "pictures=true")
    run("run", "logger=mlflow", "resume=auto", "pictures=true")
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as store:
        runs = {row[0] for row in store.execute("select run_uuid from runs")}
        tags = {row[0] for row in store.execute("select key from metrics")}
        settings = dict(store.execute("select key, value from params"))
    assert len(runs) == 1 and tags - {"epoch"} == MEASURED
    assert settings["encoder/filters"] == "8"
    assert {path.name for path in (tmp_path / "run" / "mlflow").rglob("*.png")} == {"episode.png", "classes.png"}
