"""What TensorBoard shows of a run beside losses and accuracies; ``make dashboard`` opens it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from fewshot.data.bank import ImageBank
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import Episode, EpisodeDataset, EpisodeNumber
from fewshot.methods.base import FewShotMethod, MetricMethod
from fewshot.results import Result
from fewshot.style import COLOURS, STYLE

ROWS, SUPPORT, QUERIES = 10, 5, 8  # of an episode that are drawn: classes, support samples and queries of each
MATRIX = 30  # classes that a confusion matrix has room for
HARDEST = 20  # classes that are named where there are more
EMBEDDED = 20, 10  # classes, and images of each, in the projector
COLUMNS = ("dataset", "method", "distance", "way", "shot")  # of the table of hyperparameters, before one asks for more


class Log(TensorBoardLogger):
    """TensorBoard's log of a run, without Lightning's epochs: ours are the stretches between two checkpoints."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # noqa: D102
        super().log_metrics({key: value for key, value in metrics.items() if key != "epoch"}, step)


class Dashboard(pl.Callback):
    """Logs the learning rate while a run trains, and draws a few pictures when it is tested.

    Args:
        pictures: whether to draw: an episode with its answers, how the test classes were told apart, and, where the
            method embeds every image by itself, embeddings of test classes for TensorBoard's projector.
    """

    def __init__(self, pictures: bool) -> None:
        self.pictures = pictures
        self._numbers: list[list[EpisodeNumber]] = []
        self._answers: dict[EpisodeNumber, torch.Tensor] = {}

    def on_before_optimizer_step(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if trainer.logger is not None and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            trainer.logger.log_metrics({"train/learning_rate": optimizer.param_groups[0]["lr"]}, trainer.global_step)

    def on_test_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._numbers, self._answers = list(trainer.test_dataloaders.batch_sampler), {}  # type: ignore[union-attr]

    def on_test_batch_end(  # noqa: D102
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        method: pl.LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        if self.pictures:
            self._answers |= dict(zip(self._numbers[batch_idx], outputs.argmax(-1), strict=True))

    def on_test_end(self, trainer: pl.Trainer, method: FewShotMethod) -> None:  # type: ignore[override]  # noqa: D102
        if not self.pictures:
            return
        data: EpisodeDataModule = trainer.datamodule  # type: ignore[attr-defined]
        answers = {number: of.cpu().numpy() for number, of in self._answers.items()}
        meetings = torch.from_numpy(meetings_of(data.datasets["test"], answers)).to(trainer.strategy.root_device)
        met, taken = trainer.strategy.reduce(meetings, reduce_op="sum").cpu().numpy()
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            number = min(answers)
            episode = data.datasets["test"][number]
            board, step, names = trainer.logger.experiment, trainer.global_step, data.bank.class_names("test")
            board.add_figure("test/episode", draw_episode(data.bank, episode, answers[number]), step)
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
        **{key: result[key] or "none" for key in ("method", "distance", "encoder", "dataset")},
        **{key: result[key] for key in ("way", "shot", "seed")},
        "learning_rate": result["config"]["method"]["learning_rate"],
    }
    # The same keys in every run: TensorBoard takes its columns from one of them.
    told = (*settings, "method.learning_rate", "resume")
    others = [of for of in result["overrides"] if of.lstrip("+~").partition("=")[0] not in told]
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


def meetings_of(dataset: EpisodeDataset, answers: Mapping[EpisodeNumber, NDArray[np.int64]]) -> NDArray[np.int64]:
    """How often classes met, and were taken for each other.

    Args:
        dataset: the episodes of a split.
        answers: for each episode the label given to each query, int64 ``[queries]``.

    Returns:
        int64 ``[2, classes, classes]``: for the class of a query and another one the times that both were in the
        episode, and the times that the other one was the answer.
    """
    count = len(dataset.first)
    meetings = np.zeros((2, count, count), dtype=np.int64)
    for number, given in answers.items():
        episode = dataset[number]
        classes = _classes(dataset.first, episode)
        truth = classes[episode.query_labels.numpy()]
        np.add.at(meetings[0], (truth[:, None], classes[None]), 1)
        np.add.at(meetings[1], (truth, classes[given]), 1)
    return meetings


def draw_episode(bank: ImageBank, episode: Episode, answers: NDArray[np.int64]) -> Figure:
    """Draw an episode: a line a class, the support samples, and the queries with what they were taken for.

    Args:
        bank: the images.
        episode: of positions in the bank.
        answers: the label given to each query, int64 ``[queries]``.
    """
    way = min(episode.way, ROWS)
    sides = []  # for support and queries, the positions in the labels' order and which of them are drawn
    for labels, most in ((episode.support_labels, SUPPORT), (episode.query_labels, QUERIES)):
        sides.append([torch.nonzero(labels == label).flatten()[:most] for label in range(way)])
    columns = [max(map(len, side)) for side in sides]
    side, gap = bank.images.shape[1], max(2, bank.images.shape[1] // 8)
    cell = side + 2 * gap
    canvas = np.full((way * cell, (sum(columns) + 1) * cell, bank.images.shape[3]), 255, dtype=np.uint8)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.55 * (sum(columns) + 1) + 2.4, 0.55 * way + 0.7), layout="constrained")
        axes = figure.subplots()
        for label in range(way):
            for of, positions, start in zip(sides, (episode.support, episode.query), (0, columns[0] + 1), strict=True):
                for column, sample in enumerate(of[label].tolist(), start):
                    y, x = label * cell + gap, column * cell + gap
                    canvas[y : y + side, x : x + side] = bank.images[positions[sample]].numpy()
                    if positions is episode.query:
                        _frame(axes, (x, y), side, gap, label, int(answers[sample]))
        names = [_short(bank.names[of]) for of in _classes(bank.offsets[:-1], episode)[:way]]
        axes.imshow(np.broadcast_to(canvas, (*canvas.shape[:2], 3)))
        right = int((answers == episode.query_labels.numpy()).sum())
        axes.set_title(
            f"Support, and queries: {right} of {len(answers)} right. Orange: taken for the class of that number",
            fontsize=9,
        )
        axes.set_yticks(
            [(row + 0.5) * cell for row in range(way)],
            [f"{name}  {row}" for row, name in enumerate(names, 1)],
            fontsize=7,
            parse_math=False,
        )
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    return figure


def draw_classes(met: NDArray[np.int64], taken: NDArray[np.int64], names: list[str]) -> Figure:
    """Draw how well test classes were told apart: each from each other, or the hardest where there are many.

    Args:
        met: see ``meetings_of``.
        taken: likewise.
        names: of all test classes.
    """
    seen = np.flatnonzero(met.diagonal())
    shares = np.divide(taken, met, out=np.zeros(met.shape), where=met > 0)
    with mpl.rc_context(STYLE):
        if len(seen) <= MATRIX:
            side = 0.24 * len(seen) + 2.6
            figure = Figure(figsize=(side + 0.8, side), layout="constrained")
            axes = figure.subplots()
            image = axes.imshow(shares[np.ix_(seen, seen)], cmap="cividis", vmin=0, vmax=1)
            told = [_short(names[of]) for of in seen]
            axes.set_xticks(range(len(seen)), told, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(len(seen)), told, fontsize=7, parse_math=False)
            axes.set(xlabel="answered", ylabel="class of the query")
            axes.grid(False)
            figure.colorbar(image, shrink=0.7, label="share, of the times that both were in the episode")
            return figure
        figure = Figure(figsize=(9.5, 4.6), layout="constrained")
        all_, hardest = figure.subplots(1, 2, width_ratios=(1, 1.1))
        accuracies = 100 * shares.diagonal()
        order = seen[np.argsort(accuracies[seen], kind="stable")]
        all_.plot(range(1, len(order) + 1), accuracies[order], color=COLOURS[0])
        all_.set(title=f"all {len(order)} test classes", xlabel="class, hardest first", ylabel="accuracy, %")
        all_.set_ylim(0, 103)
        rows = order[:HARDEST]
        hardest.barh(range(len(rows)), accuracies[rows], color=COLOURS[0])
        for row, of in enumerate(rows):
            others = np.where(np.arange(len(names)) == of, -1, taken[of])
            rival = names[others.argmax()] if others.max() > 0 else ""
            hardest.text(101, row, _short(rival), va="center", fontsize=7, parse_math=False)
        hardest.set_yticks(range(len(rows)), [_short(names[of]) for of in rows], fontsize=7, parse_math=False)
        hardest.set(title="the hardest, and what each was most taken for", xlabel="accuracy, %", xlim=(0, 100))
        hardest.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _frame(axes: Axes, corner: tuple[int, int], side: int, gap: int, label: int, answer: int) -> None:
    """Around a query, its colour and width telling right from wrong; a wrong answer beside it."""
    wrong = answer != label
    x, y = corner[0] - gap / 2, corner[1] - gap / 2
    colour = COLOURS[1] if wrong else COLOURS[2]
    axes.add_patch(
        Rectangle((x, y), side + gap, side + gap, fill=False, edgecolor=colour, linewidth=2.5 if wrong else 0.8)
    )
    if wrong:
        told = {"boxstyle": "square,pad=0.1", "facecolor": colour, "edgecolor": "none"}
        axes.text(x, y, str(answer + 1), color="white", fontsize=7, ha="left", va="top", bbox=told)


def _add_embeddings(logger: TensorBoardLogger, data: EpisodeDataModule, encoder: torch.nn.Module) -> None:
    """Write what the projector shows: embeddings of test classes, each with its class and its picture."""
    dataset, device = data.datasets["test"], data.trainer.strategy.root_device  # type: ignore[union-attr]
    classes, images = EMBEDDED
    shown = np.linspace(0, len(dataset.first) - 1, min(classes, len(dataset.first))).astype(int)
    positions = torch.from_numpy(
        np.concatenate([dataset.first[of] + np.arange(min(images, dataset.counts[of])) for of in shown])
    )
    embeddings = encoder(data.images_at(positions.to(device))).float().cpu()
    if embeddings.shape[1] > len(embeddings):  # as many dimensions as there are points hold all distances
        embeddings = torch.linalg.qr(embeddings.T).R.T
    names = data.bank.class_names("test")
    labels = [names[of] for of in shown for _ in range(min(images, dataset.counts[of]))]
    pixels = data.bank.images[positions].movedim(-1, 1).expand(-1, 3, -1, -1) / 255
    # SummaryWriter adds to what an interrupted test has left.
    (Path(logger.log_dir) / "projector_config.pbtxt").unlink(missing_ok=True)
    shutil.rmtree(Path(logger.log_dir) / "00000", ignore_errors=True)
    logger.experiment.add_embedding(embeddings, labels, pixels, tag="test_classes")


def _classes(first: NDArray[np.int64], episode: Episode) -> NDArray[np.int64]:
    """The class of each label of an episode of positions, by the first positions of all classes: int64 ``[way]``."""
    classes = np.zeros(episode.way, dtype=np.int64)
    classes[episode.query_labels.numpy()] = np.searchsorted(first, episode.query.numpy(), side="right") - 1
    return classes


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"…{name[-21:]}"
