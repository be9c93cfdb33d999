"""What a training run does beside training."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, with loss and accuracy and nothing else beside it."""

    def get_metrics(self, trainer: pl.Trainer, method: pl.LightningModule) -> dict[str, Any]:  # noqa: D102
        metrics = super().get_metrics(trainer, method)
        metrics.pop("v_num", None)
        return metrics


class TrainingTime(pl.Callback):
    """Measures the time spent in training episodes, validations left out; goes on where a resumed run stopped.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._since = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def on_validation_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._since = time.monotonic()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.seconds = state["seconds"]
