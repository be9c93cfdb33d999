"""What a training run does beside training."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from fewshot.methods.base import FewShotMethod


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, with loss and accuracy and nothing else beside it."""

    def get_metrics(self, trainer: pl.Trainer, method: pl.LightningModule) -> dict[str, Any]:  # noqa: D102
        metrics = super().get_metrics(trainer, method)
        metrics.pop("v_num", None)
        return metrics


class Record(pl.Callback):
    """Keeps, and tells, the validation curve and the time spent in training; a resumed run goes on from both.

    Attributes:
        seconds: spent in training steps, validations left out.
        validations: each one's estimate, and the ``trained_episodes`` before it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.validations: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._since = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def on_validation_end(self, trainer: pl.Trainer, method: FewShotMethod) -> None:  # type: ignore[override]  # noqa: D102
        trained = trainer.datamodule.episodes_by(trainer.current_epoch + 1)  # type: ignore[attr-defined]
        estimate = method.estimates["val"]
        self.validations.append({"trained_episodes": trained, **estimate._asdict()})
        told = f"{estimate.accuracy:.2%} ± {estimate.ci95:.2%}"
        method.print(f"episode {trained:,}: validation accuracy {told}", flush=True)
        self._since = time.monotonic()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"seconds": self.seconds, "validations": self.validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.seconds, self.validations = state["seconds"], state["validations"]
