"""What TensorBoard shows of a run beside losses and accuracies; ``make dashboard`` opens it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from fewshot.callbacks import Answers
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.methods.base import FewShotMethod, MetricMethod
from fewshot.metrics import meetings_of
from fewshot.pictures import draw_classes, draw_episode
from fewshot.results import Result
from fewshot.text import for_terminal

EMBEDDED = 20, 10  # classes, and images of each, in the projector
COLUMNS = ("dataset", "method", "distance", "way", "shot")  # of the table of hyperparameters, before one asks for more


class Log(TensorBoardLogger):
    """TensorBoard's log of a run, without Lightning's epochs: ours are the stretches between two checkpoints."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # noqa: D102
        super().log_metrics({key: value for key, value in metrics.items() if key != "epoch"}, step)


class Dashboard(Answers):
    """Logs the learning rate while a run trains, and draws a few pictures when it is tested.

    Args:
        pictures: whether to draw: an episode with its answers, how the test classes were told apart, and, where the
            method embeds every image by itself, embeddings of test classes for TensorBoard's projector.
    """

    def __init__(self, pictures: bool) -> None:
        super().__init__()
        self.pictures = pictures

    def on_before_optimizer_step(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if trainer.logger is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            trainer.logger.log_metrics({"train/learning_rate": optimizer.param_groups[0]["lr"]}, trainer.global_step)

    def on_test_end(self, trainer: pl.Trainer, method: FewShotMethod) -> None:  # type: ignore[override]  # noqa: D102
        if not self.pictures:
            return
        data: EpisodeDataModule = trainer.datamodule  # type: ignore[attr-defined]
        answers = self.answers
        meetings = (
            torch.from_numpy(meetings_of(data.datasets["test"], answers)).float().to(trainer.strategy.root_device)
        )
        met, taken = trainer.strategy.reduce(meetings, reduce_op="sum").cpu().numpy()
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            number = min(answers)
            episode = data.datasets["test"][number]
            board, step, names = trainer.logger.experiment, trainer.global_step, data.bank.class_names("test")
            board.add_figure("test/episode", draw_episode(data.bank, episode, answers[number].argmax(1)), step)
            board.add_figure("test/classes", draw_classes(met, taken, names), step)
            if isinstance(method, MetricMethod):
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    _add_embeddings(trainer.logger, data, method.encoder)


@rank_zero_only
def log_hyperparameters(logger: TensorBoardLogger, result: Result, step: int) -> None:
    """Let TensorBoard sort and plot runs by what they were, beside the accuracy they came to.

    Args:
        logger: of the run.
        result: see ``fewshot.training``.
        step: the last one of the training.
    """
    settings: dict[str, Any] = {
        **{key: result[key] or "none" for key in ("method", "distance", "encoder", "dataset", "optimizer", "schedule")},
        **{key: result[key] for key in ("way", "shot", "seed")},
        "learning_rate": result["config"]["optimizer"].get("lr", "none"),
    }
    # The same keys in every run: TensorBoard takes its columns from one of them.
    shown = (*settings, "optimizer.lr", "resume")
    others = [of for of in result["overrides"] if of.lstrip("+~").partition("=")[0] not in shown]
    settings["other"] = " ".join(others)
    metrics = {"val/best_accuracy": result["val_accuracy"], "test/accuracy": result["accuracy"]}
    experiment, *session = hparams(settings, metrics)
    content = experiment.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(content.content)
    for column in columns.experiment.hparam_infos:
        column.differs = column.name in COLUMNS  # TensorBoard shows those first
    content.content = columns.SerializeToString()
    board = logger.experiment
    board.add_scalar("val/best_accuracy", result["val_accuracy"], step)  # of the weights that are tested
    for summary in (experiment, *session):
        board._get_file_writer().add_summary(summary, step)
    board.flush()


def _add_embeddings(logger: TensorBoardLogger, data: EpisodeDataModule, encoder: torch.nn.Module) -> None:
    """Write what the projector shows: embeddings of test classes, each with its class and its picture."""
    dataset, device = data.datasets["test"], data.trainer.strategy.root_device  # type: ignore[union-attr]
    classes, images = EMBEDDED
    shown = np.linspace(0, len(dataset.first) - 1, min(classes, len(dataset.first))).astype(int)
    positions = torch.from_numpy(
        np.concatenate([dataset.first[of] + np.arange(min(images, dataset.counts[of])) for of in shown])
    )
    embeddings = encoder(data.images(positions.to(device))).float().cpu()
    if embeddings.shape[1] > len(embeddings):  # as many dimensions as there are points hold all distances
        embeddings = torch.linalg.qr(embeddings.T).R.T
    names = data.bank.class_names("test")
    labels = [for_terminal(names[of]) for of in shown for _ in range(min(images, dataset.counts[of]))]
    pixels = data.bank.images[positions].movedim(-1, 1).expand(-1, 3, -1, -1) / 255
    # SummaryWriter adds to what an interrupted test has left.
    (Path(logger.log_dir) / "projector_config.pbtxt").unlink(missing_ok=True)
    shutil.rmtree(Path(logger.log_dir) / "00000", ignore_errors=True)
    logger.experiment.add_embedding(embeddings, labels, pixels, tag="test_classes")
