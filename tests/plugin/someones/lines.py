"""A logger that writes lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only


class Lines(Logger):
    """Appends every measurement to a text file."""

    name, version = "lines", 0

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = Path(file)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A line for each value."""
        with self.file.open("a") as log:
            log.writelines(f"{step} {key} {value}\n" for key, value in metrics.items())

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run keeps them already."""
