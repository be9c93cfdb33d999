"""Shared by the figures: loading a run with its data, finding a test episode, saving a small PNG file."""

from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from fewshot.config import CONF
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import EpisodeIndex, EpisodeNumber
from fewshot.errors import FewShotError
from fewshot.trained import Trained, load_trained
from fewshot.training import make_data


def open_run(run: str | None, **task: int) -> tuple[Trained, EpisodeDataModule]:
    """Load a trained method on the CPU, and its data.

    Args:
        run: the directory of the training.
        task: ``way``, ``shot`` and ``query`` of the episodes, if they differ from the run's.

    Raises:
        FewShotError: ``run`` is None, or cannot be loaded.
    """
    if run is None:
        raise FewShotError("no run is given; specify the directory of a training with run=RUN_DIR")
    trained = load_trained(run)
    trained.config.merge_with(task)
    trained.config.hardware = OmegaConf.load(CONF / "hardware" / "cpu.yaml")
    data = make_data(trained.config)
    data.setup()
    return trained, data


def find_episode(data: EpisodeDataModule, number: int) -> EpisodeIndex:
    """Return a test episode by its number.

    Raises:
        FewShotError: the number is negative.
    """
    if number < 0:
        raise FewShotError(f"figure.number={number} must be at least 0")
    return data.datasets["test"][EpisodeNumber(0, number)]


def save(figure: Figure, path: Path) -> Path:
    """Save a figure as a PNG with 256 colours, which looks the same and takes at most half the space."""
    figure.savefig(path, dpi=150)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize()
    few.save(path, optimize=True)
    return path
