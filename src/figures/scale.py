"""Figure of what the size of a data set costs: building its image bank, opening it, drawing episodes."""

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.contest import peak_memory
from fewshot.data.bank import ImageClass, Source, open_bank
from fewshot.data.episodes import EpisodeDataset, EpisodeNumber
from fewshot.data.images import ImageTable
from fewshot.errors import FewShotError
from fewshot.style import COLOURS, STYLE, WIDTH
from figures.shared import save

SIZE = 28  # height and width of the images
SAMPLES = 20  # images of a class, as in Omniglot
TASK: dict[str, Any] = {"way": 20, "shot": 5, "query": 15}
EPISODES = 300  # that the rate is measured over
PANELS = {  # measurements, by the titles of their panels
    "build the bank, s": ("build",),
    "open it, and the first episode, s": ("first episode",),
    "episodes/s, 20-way 5-shot 15 queries": ("rate",),
    "peak memory, MiB": ("memory to build", "memory to draw", "images"),
}
PROPORTIONAL = ("build the bank, s", "peak memory, MiB")  # to the number of images, at best: on a log scale


def scale(images: Sequence[int], out: Path) -> list[Path]:
    """Draw time and memory against the number of images of a data set, of random 28x28 images.

    Each measurement has a process of its own, and a bank in a directory that is removed afterwards.

    Args:
        images: numbers of images to measure, at least 1,600 each.
        out: an existing directory; the largest bank needs 784 bytes an image there.

    Returns:
        The file written.

    Raises:
        FewShotError: a number of images is too small.
    """
    smallest = 4 * TASK["way"] * SAMPLES  # half of the classes are for training, a quarter for the test
    if not images or min(images) < smallest:
        raise FewShotError(f"figure.images={list(images)} must be numbers of at least {smallest} images")
    measured = [measure(number, out) for number in track(images, "measuring", transient=True)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            for key, colour, marker, line in zip(keys, COLOURS, "os^", ("-", "--", "-."), strict=False):
                values = [point[key] for point in measured]
                axes.plot(images, values, line, marker=marker, color=colour, label=key)
                if len(keys) == 1:
                    for x, value in zip(images, values, strict=True):
                        written = f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"
                        axes.annotate(
                            *(written, (x, value), (0, 7)),
                            textcoords="offset points",
                            ha="center",
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                        )
            axes.set(title=title, xlabel="images of the data set", xscale="log")
            if title in PROPORTIONAL:
                axes.set_yscale("log")
                axes.margins(0.15)
            else:
                axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
                axes.margins(x=0.15)
            if len(keys) > 1:
                axes.legend(fontsize="small")
    return [save(figure, out / "scale.png")]


def measure(images: int, out: Path) -> dict[str, float]:
    """Measure a data set of ``images`` images.

    Args:
        images: number of images.
        out: an existing directory for a temporary bank.

    Returns:
        Seconds to ``build`` the bank and to get to the ``first episode`` from a built one, the ``rate`` of episodes per
        second, and the peak memory of both processes beyond the loaded libraries in MiB, beside that of the ``images``.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix="scale-") as cache_dir:
        found: dict[str, float] = {"images": images * SIZE**2 / 2**20}
        for step in (_build, _draw):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                found |= process.submit(step, images, cache_dir).result()
    return found


def _source(images: int) -> Source:
    def classes() -> list[ImageClass]:
        return [
            ImageClass(
                f"class {number:06}", ("train", "train", "val", "test")[number % 4], SAMPLES, partial(_noise, number)
            )
            for number in range(images // SAMPLES)
        ]

    return Source(files=(), classes=classes)


def _noise(number: int) -> NDArray[np.uint8]:
    """Make the images of a class."""
    return np.random.default_rng(number).integers(0, 256, (SAMPLES, SIZE, SIZE, 1), dtype=np.uint8)


def _open(images: int, cache_dir: str) -> Any:
    return open_bank("noise", _source(images), images, cache_dir)


def _build(images: int, cache_dir: str) -> dict[str, float]:
    before, start = peak_memory(), time.perf_counter()
    _open(images, cache_dir)
    return {"build": time.perf_counter() - start, "memory to build": (peak_memory() - before) / 2**20}


def _draw(images: int, cache_dir: str) -> dict[str, float]:
    before, start = peak_memory(), time.perf_counter()
    bank = _open(images, cache_dir)
    episodes, table = EpisodeDataset(bank, "train", **TASK, seed=0), ImageTable(bank.images, "range")
    episodes[EpisodeNumber(0, 0)].load(table)
    first = time.perf_counter() - start
    times = [time.perf_counter()]
    for number in range(1, EPISODES + 1):
        episodes[EpisodeNumber(0, number)].load(table)
        times.append(time.perf_counter())
    rate = 1 / median(b - a for a, b in pairwise(times))  # the system may still be writing the bank to the disk
    return {"first episode": first, "rate": rate, "memory to draw": (peak_memory() - before) / 2**20}
