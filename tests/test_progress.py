"""What a run shows: the run directory at once, its settings, one line of progress, its accuracies."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fewshot import progress
from fewshot.callbacks import Record
from fewshot.config import ROOT, compose
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.progress import ProgressBar
from fewshot.training import train

TINY = [
    *("train.episodes=6", "train.way=5", "train.query=1", "query=3", "val.every=2", "val.episodes=2"),
    *("test.episodes=3", "encoder.filters=8", "hardware=cpu", "logger=none", "dataset.source.samples=4"),
]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from fewshot.cli import main; sys.argv[0] = 'fewshot'; main()"


def test_the_run_directory_is_shown_before_anything_slow_is_imported(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, "train", f"hydra.run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == f"run directory: {tmp_path / 'run'}\n"
    assert "torch" in done.stderr


def test_without_a_terminal_settings_progress_and_results_are_plain_lines(tmp_path, cache_dir, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINES", 0)
    train(compose(*TINY, f"run_dir={tmp_path}", f"cache_dir={cache_dir}"))
    shown = capsys.readouterr().out
    for line in (
        r"data     glyphs, split: scripts",
        r"classes  338 train, 43 val, 129 test",
        r"method   protonet, distance l2",
        r"train    6 5-way 1-shot episodes; test 5-way 1-shot",
        r"encoder  conv4, 1,\d+ parameters",
        r"device   .*, precision 32-true",
        r"seed     0",
        r"training: 1/6 episodes  \d:\d\d left  loss [\d.]+ +acc +[\d.]+%",
        r"validating: 4/6 episodes  \d:\d\d left  loss [\d.]+ +acc +[\d.]+%  best [\d.]+%",
        r"episode 2: validation accuracy .*",
        r"Trained in 0:\d\d; the best weights are from episode [246]\.",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), line
    assert re.search(r"│ test +│ +[\d.]+% ± [\d.]+% │ +3 │", shown)
    assert re.search(r"│ validation +│ +[\d.]+% ± [\d.]+% │ +2 │", shown)
    assert "\r" not in shown and "\x1b" not in shown


@pytest.fixture
def terminal(monkeypatch):
    """What a bar writes to a terminal of some width, and a trainer to show."""

    def make(columns):
        written = io.StringIO()
        console = Console(file=written, force_terminal=True, width=columns, color_system=None, legacy_windows=False)
        monkeypatch.setattr(progress, "Console", lambda: console)
        monkeypatch.setattr(progress, "REFRESH", 0)
        monkeypatch.setattr(progress, "data_of", lambda trainer: trainer.datamodule)
        record = Record()
        record.validations = [{"trained_episodes": 1, "accuracy": accuracy} for accuracy in (0.5, 1.0, 0.9)]
        data = SimpleNamespace(trained=0, train_episodes=60_000, episodes={"test": 10_000})
        metrics = {"train/loss": 0.0123456, "train/accuracy": 1.0, "val/accuracy": 0.9}
        trainer = SimpleNamespace(
            datamodule=data, callback_metrics=metrics, callbacks=[record], global_step=0, log_every_n_steps=1
        )
        return trainer, written

    return make


@pytest.mark.parametrize("columns", [80, 120])
def test_the_bar_is_one_line_that_fits_the_terminal(terminal, monkeypatch, columns):
    trainer, written = terminal(columns)
    method = SimpleNamespace(device=torch.device("cpu"))
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = ProgressBar()
    bar.on_train_start(trainer, method)
    trainer.datamodule.trained, now = 30_000, now + 41_400.0
    bar.on_train_batch_end(trainer, method, None, None, 0)
    bar.on_validation_batch_end()
    bar.on_validation_end(trainer, method)
    bar.print("episode 30,000:", "a line above the bar")
    trainer.datamodule.trained, now = 60_000, now + 5.0
    bar.on_train_batch_end(trainer, method, None, None, 1)
    bar.on_train_end(trainer, method)
    lines = [re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", written.getvalue())]
    assert max(map(len, lines)) <= columns
    assert any(
        re.fullmatch(r"training +[━╸╺]+ +30,000/60,000  11:30:00 left  loss 0\.0123  acc 100.0%  best 100.0% *", line)
        for line in lines
    ), lines
    assert any(line.startswith("validating ") for line in lines)
    assert "episode 30,000: a line above the bar" in [line.strip() for line in lines]
    assert re.match(r"training +━+ 60,000/60,000  in 11:30:05  loss", [line for line in lines if line.strip()][-1])


def test_the_time_left_of_a_test_does_not_count_the_embedding_before_it(terminal, monkeypatch):
    trainer, written = terminal(80)
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    trainer.num_test_batches = [500]
    bar = ProgressBar()
    bar.on_test_start(trainer, PrototypicalNetwork(torch.nn.Identity()))
    for batch, seconds in enumerate((76.0, 0.5)):
        now += seconds
        bar.on_test_batch_end(trainer, None, None, None, batch)
    bar.on_test_end(trainer, None)
    shown = written.getvalue()
    assert re.search(r"embedding +0/10,000", shown)
    assert re.search(r"testing +20/10,000 *[\r\n]", shown), "one batch says nothing about the pace"
    assert re.search(r"testing +40/10,000  4:09 left", shown)


def test_a_bar_that_is_disabled_shows_nothing(terminal):
    trainer, written = terminal(80)
    bar = ProgressBar()
    bar.disable()
    bar.on_test_start(trainer, None)
    trainer.num_test_batches = [1]
    bar.on_test_batch_end(trainer, None, None, None, 0)
    bar.on_test_end(trainer, None)
    assert not bar.is_enabled and not written.getvalue()
