"""What several figures need: a trained run with its data, a test episode, a small PNG file."""

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
    """Load a trained method, on the CPU, and its data.

    Args:
        run: the directory of the training.
        task: ``way``, ``shot`` and ``query`` of the episodes, where they differ from the run's.

    Raises:
        FewShotError: no run is named, or it cannot be loaded.
    """
    if run is None:
        raise FewShotError("no run is named; name the directory that a training left: run=RUN_DIR")
    trained = load_trained(run)
    trained.config.merge_with(task)
    trained.config.hardware = OmegaConf.load(CONF / "hardware" / "cpu.yaml")
    data = make_data(trained.config)
    data.setup()
    return trained, data


def find_episode(data: EpisodeDataModule, number: int) -> EpisodeIndex:
    """A test episode by its number.

    Raises:
        FewShotError: the number is negative.
    """
    if number < 0:
        raise FewShotError(f"figure.number={number} must be at least 0")
    return data.datasets["test"][EpisodeNumber(0, number)]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG of 256 colours: it looks the same, and takes half the space or less."""
    figure.savefig(path, dpi=150)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize()
    few.save(path, optimize=True)
    return path
