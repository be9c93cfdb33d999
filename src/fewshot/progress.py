"""What a run shows: its settings at the start, one progress bar, its accuracies at the end."""

import time
from collections.abc import Mapping
from datetime import timedelta
from math import nan
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from fewshot.callbacks import Record, data_of
from fewshot.data.bank import SPLITS, ImageBank
from fewshot.hardware import asynchronous, describe, machine
from fewshot.methods.base import FewShotMethod, MetricMethod
from fewshot.results import best_validation
from fewshot.text import make_table, say

REFRESH = 0.2  # seconds between updates of the bar
LINES = 30.0  # seconds between lines where there is no bar


class ProgressBar(pl.callbacks.ProgressBar):
    """One line for the whole training, and one for the test, that fits 80 columns.

    In a terminal it is a bar. Elsewhere (a file, a pipe, a notebook) it is a plain line every ``LINES`` seconds.

    The time left is that of an average episode of this process, validations included, times the remaining episodes. In
    a test, the first episodes do not count, because a metric method embeds all images before them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._name, self._metrics = "", ""
        self._total = self._first = self._done = 0
        self._began = self._counted = self._shown = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether this process shows anything; only rank 0 does."""
        return self._enabled

    def disable(self) -> None:  # noqa: D102
        self._enabled = False

    def enable(self) -> None:  # noqa: D102
        self._enabled = True

    def print(self, *words: Any, **_: Any) -> None:
        """Print a line, above the bar if there is one."""
        say(" ".join(map(str, words)))

    def on_train_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        data = data_of(trainer)
        self._start("training", data.trained, data.train_episodes)

    def on_train_batch_end(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        self._done = data_of(trainer).trained
        # Showing a number means waiting for it: on a GPU, do so only when the log does, too.
        logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._due() and (logged or not asynchronous(method.device)):
            self._metrics = _metrics(trainer)
        self._show("training")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:  # noqa: D102
        self._show("validating")

    def on_validation_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._metrics = _metrics(trainer)
        self._show("training", now=self._bar is not None)

    def on_train_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: D102
        if not asynchronous(method.device) or self._done == self._total:
            self._metrics = _metrics(trainer)
        self._stop()

    def on_test_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: D102
        self._metrics = ""
        first = "embedding" if isinstance(method, MetricMethod) else "testing"
        self._start(first, 0, data_of(trainer).episodes["test"])

    def on_test_batch_end(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        self._done = round(self._total * (batch_idx + 1) / sum(trainer.num_test_batches))
        if batch_idx == 0:
            self._first, self._counted = self._done, time.monotonic()
        self._show("testing")

    def on_test_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._stop()

    def on_exception(  # noqa: D102
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        method: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        self._stop()

    def teardown(self, trainer: pl.Trainer, method: pl.LightningModule, stage: str) -> None:  # noqa: ARG002, D102
        self._stop()

    def _start(self, name: str, done: int, total: int) -> None:
        self._name, self._first, self._done, self._total = name, done, done, total
        self._began = self._counted = self._shown = time.monotonic()
        console = Console()
        if not self._enabled or done >= total or not console.is_interactive or console.is_jupyter:
            return
        whole = Column(no_wrap=True)
        columns = (
            TextColumn("{task.description:10}", table_column=whole),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}", table_column=whole),
        )
        self._bar = Progress(*columns, console=console, auto_refresh=False, expand=True)
        self._bar.add_task(name, total=total, completed=done, facts=self._facts())
        self._bar.start()

    def _due(self) -> bool:
        return time.monotonic() - self._shown >= (LINES if self._bar is None else REFRESH)

    def _show(self, name: str, now: bool = False) -> None:
        """Update the bar or print a line, if the last time is long enough ago."""
        if not self._enabled or self._done >= self._total or not (now or self._due()):
            return
        self._name, self._shown = name, time.monotonic()
        if self._bar is None:
            say(f"{name}: {self._facts(episodes=' episodes')}")
        else:
            (task,) = self._bar.task_ids
            self._bar.update(task, description=name, completed=self._done, facts=self._facts(), refresh=True)

    def _stop(self) -> None:
        if self._bar is None:
            return
        (task,) = self._bar.task_ids
        self._bar.update(task, description=self._name, completed=self._done, facts=self._facts(), refresh=True)
        self._bar.stop()
        self._bar = None

    def _facts(self, episodes: str = "") -> str:
        """Return episodes, time left and metrics."""
        now, counted = time.monotonic(), self._done - self._first
        left = f"{_clock((now - self._counted) / counted * (self._total - self._done))} left" if counted else ""
        clock = f"in {_clock(now - self._began)}" if self._done == self._total else left
        return "  ".join(filter(None, [f"{self._done:,}/{self._total:,}{episodes}", clock, self._metrics]))


@rank_zero_only
def show_settings(config: DictConfig, bank: ImageBank, method: FewShotMethod, trainer: pl.Trainer) -> None:
    """Print what is about to be trained: data, method, encoder, device and seed, one line each."""
    names, data = config.choices, bank.record()
    rule = f", split: {data['split']}" if data["split"] else ""
    counts = {key: ", ".join(f"{data[key][split]:,} {split}" for split in SPLITS) for key in ("classes", "images")}
    distance = f", distance {names.distance}" if "distance" in config.method else ""
    train, batch = config.train, config.train.get("batch_size")
    trained = f"{train.way}-way {train.shot}-shot episodes" if batch is None else f"batches of {batch} images"
    parameters = sum(parameter.numel() for parameter in method.encoder.parameters())
    device = describe(machine(trainer.strategy.root_device, trainer.world_size))
    for name, words in {
        "data": f"{names.dataset}{rule}",
        **counts,
        "method": f"{names.method}{distance}",
        "train": f"{train.episodes:,} {trained}; test {config.way}-way {config.shot}-shot",
        "encoder": f"{names.encoder}, {parameters:,} parameters",
        "device": f"{device}, precision {trainer.precision}",
        "seed": f"{config.seed}",
    }.items():
        say(f"{name:8} {words}")


@rank_zero_only
def show_results(results: Mapping[str, Any], run_dir: Path) -> None:
    """Print the accuracies of a complete run."""
    # A resumed run reads these from a file, which may lack some.
    chosen = best_validation(results)
    rows = [
        (name, f"{point['accuracy']:.2%} ± {point.get('ci95', nan):.2%}", f"{point.get('episodes', '')}")
        for name, point in (("test", results), ("validation", chosen))
        if point is not None
    ]
    title = f"{results['way']}-way {results['shot']}-shot accuracy, 95% interval"
    weights = "" if chosen is None else f"; the best weights are from episode {chosen['trained_episodes']:,}"
    say(
        make_table(title, ("classes", "accuracy", "episodes"), rows, numbers=("accuracy", "episodes")),
        f"Trained in {_clock(results['train_seconds'])}{weights}.",
        f"Results, checkpoints, log: {run_dir}",
    )


def _metrics(trainer: pl.Trainer) -> str:
    values = trainer.callback_metrics
    record = next((callback for callback in trainer.callbacks if isinstance(callback, Record)), None)  # type: ignore[attr-defined]
    best = max((point["accuracy"] for point in record.validations), default=None) if record is not None else None
    # Of constant width, so that the bar beside them keeps its length.
    shown = [f"loss {values['train/loss']:<6.3g}"] if "train/loss" in values else []
    shown += [f"acc {values['train/accuracy']:>6.1%}"] if "train/accuracy" in values else []
    shown += [f"best {best:.1%}"] if best is not None else []
    return "  ".join(shown)


def _clock(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, without leading zeros: 1:02:03, 2:03."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")
