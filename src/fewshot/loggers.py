"""Loggers: any of Lightning's, continued when the run is resumed."""

import csv
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from fewshot.errors import FewShotError, mistake, reason
from fewshot.files import write_atomically
from fewshot.paths import install

RUN_IDS = ("id", "run_id", "experiment_key")  # loggers' names for the server's identifier of a run
EXTRAS = ("wandb", "mlflow")  # loggers in separate packages, which are extras of this one


# TensorBoard sorts groups by name.
GROUPS = {"train": "1 train", "val": "2 val", "test": "3 test"}


class TensorBoard(TensorBoardLogger):
    """TensorBoard's log of a run, without epochs: they are only the intervals between checkpoints.

    Args:
        version: the folder, which TensorBoard shows as the name of the run. It may come from a checkpoint, so
            characters other than letters, digits and ``_.=+-`` are replaced.
        purge_step: entries of an earlier attempt at this training step and later ones are ignored.
        settings: see ``TensorBoardLogger``.
    """

    def __init__(self, version: str, purge_step: int = 0, **settings: Any) -> None:
        folder = re.sub(r"[^\w.=+-]+", "-", version)[:150].strip(".-") or "run"
        super().__init__(version=folder, purge_step=purge_step, **settings)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # noqa: D102
        super().log_metrics({in_group(tag): value for tag, value in _without_epoch(metrics).items()}, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Keep the configuration for ``hparams.yaml``; ``fewshot.dashboard`` writes the table of hyperparameters."""
        self.hparams = params


def in_group(tag: str) -> str:
    """Return the name of a scalar or picture in TensorBoard, whose groups are then in the order of ``GROUPS``."""
    group, slash, name = tag.partition("/")
    return f"{GROUPS.get(group, group)}{slash}{name}"


class CSV(CSVLogger):
    """A table of scalars that a resumed run appends to; Lightning's own logger deletes it.

    Args:
        purge_step: rows of an earlier attempt at this training step and later ones are dropped.
        settings: see ``CSVLogger``.
    """

    def __init__(self, purge_step: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self._purge_step = purge_step

    @property
    @rank_zero_only
    def experiment(self) -> Any:
        """The writer of the table."""
        if self._experiment is None:
            self._experiment = _Appended(self.log_dir, self._purge_step)
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]  # noqa: D102
        super().log_metrics(_without_epoch(metrics), step)


class _Appended(ExperimentWriter):
    def __init__(self, log_dir: str, purge_step: int) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.metrics_keys = list(reader.fieldnames or [])
                rows = [row for row in reader if row["step"] and int(row["step"]) < purge_step]
        except (csv.Error, KeyError, ValueError) as error:
            raise FewShotError(f"{path} is broken ({reason(error)}); move it elsewhere, and resume again") from error
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, fieldnames=self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, content.getvalue().encode())

    def _check_log_dir_exists(self) -> None:
        """Keep existing files; Lightning would remove them."""


@contextmanager
def open_loggers(config: DictConfig, step: int = 0, ids: Mapping[str, str] | None = None) -> Iterator[list[Logger]]:
    """Open the configured loggers, and close them at the end.

    Args:
        config: the composed ``conf/train.yaml``; ``logger`` is one logger, a mapping of several, or null.
        step: the training step that the run starts from.
        ids: the identifiers of a resumed run, see ``run_ids``.

    Raises:
        FewShotError: a logger cannot be made, for example because its package is missing.
    """
    loggers = [_make(key, node, step, ids or {}) for key, node in parts("logger", config.get("logger"))]
    try:
        yield loggers
    except BaseException:
        _close(loggers, failed=True)
        raise
    _close(loggers, failed=False)


def parts(key: str, node: DictConfig | None) -> list[tuple[str, DictConfig]]:
    """Return the nodes, with their keys, of a group that holds one object or a mapping of several.

    Raises:
        FewShotError: a node has no ``_target_``.
    """
    if node is None:
        return []
    nodes = {key: node} if "_target_" in node else {f"{key}.{name!s}": part for name, part in node.items()}
    for name, part in nodes.items():
        if part is not None and not (isinstance(part, DictConfig) and "_target_" in part):
            raise FewShotError(f"{name} has no _target_: name the class to make, or remove {name} with ~{name}")
    return [(name, part) for name, part in nodes.items() if part is not None]


def run_ids(loggers: Sequence[Logger]) -> dict[str, str]:
    """Return the identifier of this run on each logger's server, for checkpoints; other loggers are left out."""
    return {
        type(logger).__name__: str(logger.version)
        for logger in loggers
        if _run_id(type(logger)) is not None and logger.version is not None
    }


def _make(key: str, node: DictConfig, step: int, ids: Mapping[str, str]) -> Logger:
    target = str(node["_target_"])
    kind = get_class(target)
    resumed: dict[str, Any] = {"purge_step": step} if "purge_step" in signature(kind).parameters else {}
    known, run_id = ids.get(kind.__name__), _run_id(kind)
    # The checkpoint is untrusted.
    if run_id is not None and isinstance(known, str) and re.fullmatch(r"[\w-]{1,64}", known):
        resumed[run_id] = known
    try:
        logger = instantiate(node, **resumed)
    except Exception as error:
        if mistake(error) is not None:
            raise
        cause = error.__cause__ or error
        extra = kind.__name__.removesuffix("Logger").lower()
        if isinstance(cause, ModuleNotFoundError) and extra in EXTRAS:
            raise FewShotError(f"logger={extra} needs the package {extra}: {install(extra)}") from error
        raise FewShotError(f"{key}={target} cannot be made: {reason(cause)}") from error
    if not isinstance(logger, Logger):
        raise FewShotError(f"{key}._target_={target} is not a logger of Lightning")
    return logger


def _run_id(kind: type) -> str | None:
    return next((name for name in RUN_IDS if name in signature(kind).parameters), None)


def _close(loggers: Sequence[Logger], failed: bool) -> None:
    for logger in loggers:
        logger.save()
    if "wandb" in sys.modules and any(isinstance(logger, WandbLogger) for logger in loggers):
        # The next run of a sweep in this process would continue this one.
        sys.modules["wandb"].finish(exit_code=int(failed))


def _without_epoch(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "epoch"}
