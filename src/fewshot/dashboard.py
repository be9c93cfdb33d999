"""What is logged in addition to losses and accuracies: configuration, learning rate, pictures."""

import math
import shutil
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import matplotlib as mpl
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from fewshot.callbacks import Predictions
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.loggers import in_group, run_ids
from fewshot.methods.base import FewShotMethod, MetricMethod
from fewshot.metrics import confusion_counts
from fewshot.pictures import draw_classes, draw_episode
from fewshot.results import Result, best_validation
from fewshot.text import for_terminal, say

DRAWN = 1, 4  # support samples and queries of each class, in the picture of an episode
EMBEDDED = 20, 10  # classes, and images of each, in the projector
# Names of the measured columns there.
MEASURED = {
    "val/best_accuracy": "validation accuracy",
    "val/best_ci95": "validation ±",
    "test/accuracy": "test accuracy",
    "test/ci95": "test ±",
}
VALIDATION, TEST = "2 val accuracy, %", "3 test accuracy, %"
COLUMNS = (VALIDATION, TEST, "method", "way", "shot")  # shown by default in the table of hyperparameters


class Dashboard(Predictions):
    """Logs the configuration and learning rate of a run, and a few pictures of its test.

    Args:
        pictures: whether to draw an episode with its answers, the confusion of test classes and, if the method
            embeds each image separately, embeddings of test classes for TensorBoard's projector.

    Attributes:
        run_ids: the identifier of the resumed run on each logger's server; see ``fewshot.loggers``.
    """

    def __init__(self, pictures: bool) -> None:
        super().__init__()
        self.pictures = pictures
        self.run_ids: dict[str, str] = {}
        self._loggers: Sequence[Logger] = ()

    def on_fit_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: D102
        self._loggers = trainer.loggers
        for logger in trainer.loggers:
            # MLflow does not allow a logged value to change, such as the number of episodes.
            if not (isinstance(logger, MLFlowLogger) and type(logger).__name__ in self.run_ids):
                logger.log_hyperparams(dict(method.hparams))

    def on_before_optimizer_step(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics({"train/learning_rate": optimizer.param_groups[0]["lr"]}, trainer.global_step)

    def on_test_end(self, trainer: pl.Trainer, method: FewShotMethod) -> None:  # type: ignore[override]  # noqa: D102
        if not self.pictures or not any(map(_takes_pictures, trainer.loggers)):
            return
        data: EpisodeDataModule = trainer.datamodule  # type: ignore[attr-defined]
        predictions = self.predictions
        counts = torch.from_numpy(confusion_counts(data.datasets["test"], predictions)).float()
        counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
        together, predicted = counts.cpu().numpy()
        if not trainer.is_global_zero:
            return
        number = min(predictions)
        episode = data.datasets["test"][number]
        pictures = {
            "test/episode": draw_episode(data.bank, episode, predictions[number].argmax(1), *DRAWN),
            "test/classes": draw_classes(together, predicted, data.bank.class_names("test")),
        }
        for logger in filter(_takes_pictures, trainer.loggers):
            for tag, figure in pictures.items():
                _log_picture(logger, tag, figure, trainer)
            if isinstance(logger, TensorBoardLogger) and isinstance(method, MetricMethod):
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    _add_embeddings(logger, data, method.encoder)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        ids = run_ids(self._loggers)
        return {"run_ids": ids} if ids else {}

    def load_run_ids(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Read the identifiers of the run from its checkpoint, before any logger is made."""
        callbacks = checkpoint.get("callbacks") if checkpoint is not None else None
        state = callbacks.get(type(self).__name__) if isinstance(callbacks, Mapping) else None
        ids = state.get("run_ids") if isinstance(state, Mapping) else None
        self.run_ids = dict(ids) if isinstance(ids, Mapping) else {}


@rank_zero_only
def log_result(loggers: Sequence[Logger], result: Result, step: int) -> None:
    """Log the accuracy of the chosen weights; in TensorBoard with the hyperparameters, to sort and plot by.

    Args:
        loggers: the loggers of the run.
        result: see ``fewshot.training``.
        step: the last training step.
    """
    for logger in loggers:
        best = {tag: value for tag, value in _measured(result).items() if tag.startswith("val/")}
        logger.log_metrics(best, step)
        if isinstance(logger, TensorBoardLogger):
            _log_hyperparameters(logger, result)


def _takes_pictures(logger: Logger) -> bool:
    return isinstance(logger, TensorBoardLogger | MLFlowLogger) or hasattr(logger, "log_image")


def _log_picture(logger: Logger, tag: str, figure: Figure, trainer: pl.Trainer) -> None:
    figure.set_dpi(200)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(in_group(tag), figure, trainer.global_step)
    elif isinstance(logger, MLFlowLogger):
        directory = _path_of(logger.experiment.get_run(logger.run_id).info.artifact_uri)
        # A store in the run directory names its own path, which may be outdated or malicious.
        if directory is not None and not directory.is_relative_to(Path(trainer.default_root_dir).resolve()):
            say(f"no pictures for MLflow: its store puts them into {directory}, outside the run directory", error=True)
        else:
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")
    else:
        content = BytesIO()
        figure.savefig(content, format="png")
        logger.log_image(tag, [Image.open(content)], trainer.global_step)  # type: ignore[attr-defined]


def _path_of(uri: str) -> Path | None:
    """Return the directory that a URI names, or None if it names a server."""
    address = urlparse(uri)
    return Path(unquote(address.path)).resolve() if address.scheme in ("", "file") else None


def _measured(result: Result) -> dict[str, float]:
    """Return what is logged at the end, by the names in ``MEASURED``."""
    best = best_validation(result)
    validated = {} if best is None else {f"val/best_{key}": best[key] for key in ("accuracy", "ci95")}
    return validated | {f"test/{key}": result[key] for key in ("accuracy", "ci95")}


def _log_hyperparameters(logger: TensorBoardLogger, result: Result) -> None:
    settings: dict[str, Any] = {
        # Numbers would be shown as 5.0000. These come first, since TensorBoard sorts the columns, measured ones last.
        VALIDATION: _percent(best_validation(result)),
        TEST: _percent(result),
        **{key: result[key] or "none" for key in ("method", "distance", "encoder", "dataset", "optimizer", "schedule")},
        **{key: str(result[key]) for key in ("way", "shot", "seed")},
        "learning_rate": result["config"]["optimizer"].get("lr", "none"),
    }
    # Every run has the same keys, because TensorBoard takes its columns from one of the runs.
    shown = (*settings, "optimizer.lr", "resume")
    settings["other"] = " ".join(
        override for override in result["overrides"] if override.lstrip("+~").partition("=")[0] not in shown
    )
    measured = _measured(result)
    metrics = {in_group(tag): measured.get(tag, math.nan) for tag in MEASURED}
    experiment, *session = hparams(settings, metrics)
    content = experiment.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(content.content)
    for column in columns.experiment.hparam_infos:
        column.differs = column.name in COLUMNS  # TensorBoard shows those first
    for metric, name in zip(columns.experiment.metric_infos, MEASURED.values(), strict=True):
        metric.display_name = name
    content.content = columns.SerializeToString()
    content = session[0].value[0].metadata.plugin_data
    start = HParamsPluginData.FromString(content.content)
    # Shown instead of the folder, whose end is cut; the path tells runs of equal names apart.
    start.session_start_info.group_name = f"{Path(logger.log_dir).name} {Path(logger.log_dir).absolute().parent}"
    content.content = start.SerializeToString()
    for summary in (experiment, *session):
        logger.experiment._get_file_writer().add_summary(summary)
    logger.experiment.flush()


def _framed(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Add a frame of its class's colour to each image, since the projector shows images in no other colour.

    Args:
        pixels: ``[images, 3, height, width]``, in [0, 1].
        colours: ``[images, 3]``, in [0, 1].
    """
    width = max(2, pixels.shape[-1] // 8)
    height, breadth = pixels.shape[2] + 2 * width, pixels.shape[3] + 2 * width
    framed = colours[:, :, None, None].float().repeat(1, 1, height, breadth)
    framed[:, :, width:-width, width:-width] = pixels
    return framed


def _percent(estimate: Mapping[str, float] | None) -> str:
    return "none" if estimate is None else f"{100 * estimate['accuracy']:.2f} ± {100 * estimate['ci95']:.2f}"


def _add_embeddings(logger: TensorBoardLogger, data: EpisodeDataModule, encoder: torch.nn.Module) -> None:
    """Write embeddings of test images for the projector, each with its class and picture."""
    dataset, device = data.datasets["test"], data.trainer.strategy.root_device  # type: ignore[union-attr]
    classes, images = EMBEDDED
    shown = np.linspace(0, len(dataset.first) - 1, min(classes, len(dataset.first))).astype(int)
    counts = [min(images, dataset.counts[label]) for label in shown]
    positions = torch.from_numpy(
        np.concatenate([dataset.first[label] + np.arange(count) for label, count in zip(shown, counts, strict=True)])
    )
    embeddings = encoder(data.images(positions.to(device))).float().cpu()
    if embeddings.shape[1] > len(embeddings):  # as many dimensions as points preserve all distances
        embeddings = torch.linalg.qr(embeddings.T).R.T
    names = data.bank.class_names("test")
    labels = [for_terminal(names[label]) for label, count in zip(shown, counts, strict=True) for _ in range(count)]
    pixels = data.bank.images[positions].movedim(-1, 1).expand(-1, 3, -1, -1) / 255
    colours = mpl.colormaps["tab20"](np.arange(len(shown)) % 20)[:, :3]
    pixels = _framed(pixels, torch.from_numpy(np.repeat(colours, counts, axis=0)))
    # SummaryWriter would append to the files of an interrupted test.
    (Path(logger.log_dir) / "projector_config.pbtxt").unlink(missing_ok=True)
    shutil.rmtree(Path(logger.log_dir) / "00000", ignore_errors=True)
    logger.experiment.add_embedding(embeddings, labels, pixels, tag="test_classes")
