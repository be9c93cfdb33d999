"""Training, evaluation, episode making and bank building: ours and other implementations."""

import contextlib
import os
import queue
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.contest import Contest, Entrant, Work
from benchmarks.references import PngEpisodes, copy_weights, textbook_conv4, textbook_matching, textbook_protonet
from fewshot.config import compose
from fewshot.data.bank import ImageBank, open_bank
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import Episode, EpisodeDataset, EpisodeNumber, MetaBatch
from fewshot.data.images import ImageTable
from fewshot.data.miniimagenet import miniimagenet
from fewshot.methods.base import FewShotMethod
from fewshot.training import make_data, make_method, make_trainer

OMNIGLOT = {"size": 28, "channels": 1, "classes": 1200, "images": 20, "way": 60, "shot": 1, "query": 5, "steps": 10}
MINIIMAGENET = {"size": 84, "channels": 3, "classes": 100, "images": 40, "way": 20, "shot": 5, "query": 15, "steps": 2}
EVALUATION = {**OMNIGLOT, "way": 5, "query": 15}
MATCHING = {**OMNIGLOT, "way": 20, "steps": 20}
TEXTBOOK = {"protonet": textbook_protonet, "matching": textbook_matching}
LEARNING_RATE = 1e-3
ENOUGH = 10_000  # training episodes: more than any contest takes, and Lightning counts them several times


def through_lightning(
    shape: dict[str, Any], method: str = "protonet", device: str = "cpu"
) -> tuple[Work, Callable[[], None]]:
    """Train a method like ``src/train.py``, some steps at a time, with the training paused in between."""
    steps, requests, reported = shape["steps"], queue.SimpleQueue[None](), queue.SimpleQueue[Any]()

    class Gate(pl.Callback):
        losses: ClassVar[list[torch.Tensor]] = []

        def on_train_start(self, *_: Any) -> None:
            requests.get()

        def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
            self.losses.append(outputs["loss"])
            if len(self.losses) == steps:
                reported.put(torch.stack(self.losses).cpu().numpy())
                self.losses.clear()
                requests.get()

    config = _config(shape, ENOUGH, method=method, device=device)
    data, module = _data(config, shape), _method(config, shape)
    trainer = make_trainer(config, Gate())

    def fit() -> None:
        try:
            _quietly(lambda: trainer.fit(module, data))
        except Exception as error:
            reported.put(error)

    def work() -> NDArray[Any]:
        requests.put(None)
        found = reported.get()
        if isinstance(found, Exception):
            raise found
        return found

    return work, fit


def bare_loop(
    shape: dict[str, Any], device: str = "cpu", change: Callable[[torch.nn.Module], None] | None = None
) -> Work:
    """The same model, changed by ``change``, in a minimal loop, on episodes that are already normalised tensors."""
    config = _config(shape, episodes=10**6)
    method = _method(config, shape).train().to(device)
    if change is not None:
        change(method.encoder)
    bank, dataset = _noise(shape), _episodes(shape)
    episodes = []
    for number in range(shape["steps"]):
        episode = dataset[EpisodeNumber(0, number)].load(ImageTable(bank.images, "range"))
        episodes.append(episode.apply(lambda tensor: tensor.to(device)))
    return _loop(method, method.parameters(), cycle(episodes), shape["steps"])


def textbook(shape: dict[str, Any], method: str = "protonet", device: str = "cpu") -> Work:
    """A DataLoader whose workers open a file for every image, and Conv4 as usually written."""
    model = _textbook(shape).to(device)
    on_gpu = device != "cpu"
    workers = min(8, os.cpu_count() or 1) if on_gpu else 2
    loader = _png_loader(shape, 10**5, workers=workers, pin_memory=on_gpu)
    episodes = (episode.apply(lambda tensor: tensor.to(device, non_blocking=True)) for episode in loader)
    return _loop(TEXTBOOK[method](model), model.parameters(), episodes, shape["steps"])


def _loop(
    solve: Callable[[Episode], torch.Tensor],
    parameters: Iterable[torch.nn.Parameter],
    episodes: Iterator[Episode],
    steps: int,
) -> Work:
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def work() -> NDArray[Any]:
        losses = []
        for episode in islice(episodes, steps):
            loss = cross_entropy(solve(episode), episode.query_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).cpu().numpy()

    return work


def evaluate(shape: dict[str, Any], episodes: int) -> Work:
    """The test of ``src/train.py``."""
    config = _config(shape, episodes=1, test=episodes)
    data, method = _data(config, shape), _method(config, shape)
    trainer = make_trainer(config)

    def work() -> NDArray[Any]:
        _quietly(lambda: trainer.test(method, data, verbose=False))
        return np.array([method.estimates["test"].accuracy])

    return work


def textbook_evaluate(shape: dict[str, Any], episodes: int) -> Work:
    """Open and embed every image of every episode again."""
    model = _textbook(shape)
    solve, loader = textbook_protonet(model.eval()), _png_loader(shape, episodes, "test")

    def work() -> NDArray[Any]:
        right = total = 0
        with torch.no_grad():
            for episode in loader:
                right += int((solve(episode).argmax(1) == episode.query_labels).sum())
                total += len(episode.query_labels)
        return np.array([right / total])

    return work


def make_episodes(shape: dict[str, Any], episodes: int) -> Work:
    """The loader of the data module, and the gathering of images after it."""
    config = _config(shape, episodes=episodes)
    data = _data(config, shape)
    data.setup()
    data.trainer = make_trainer(config)
    data.trainer.strategy.connect(_method(config, shape))

    def work() -> NDArray[Any]:
        sums = [batch.load().query.sum() for batch in data.train_dataloader() if isinstance(batch, MetaBatch)]
        return torch.stack(sums).numpy()

    return work


def textbook_make_episodes(shape: dict[str, Any], episodes: int) -> Work:
    """A DataLoader whose workers open an image file for every image."""
    loader = _png_loader(shape, episodes)
    return lambda: torch.stack([episode.query.sum() for episode in loader]).numpy()


def build_bank(images: int) -> Work:
    """Build a bank from JPEG files with one folder per class."""
    folder = _jpegs(images)

    def work() -> NDArray[Any]:
        with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(None):
            bank = open_bank("bench", miniimagenet(str(folder), size=84), {}, cache)
            return bank.images.numpy().sum((1, 2, 3), dtype=np.int64)

    return work


def textbook_build(images: int) -> Work:
    """Open the same files one after another into one array."""
    folder = _jpegs(images) / "miniimagenet"

    def work() -> NDArray[Any]:
        files = [file for split in ("train", "val", "test") for file in sorted((folder / split).rglob("*.jpg"))]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).sum((1, 2, 3), dtype=np.int64)

    return work


def contests() -> dict[str, Contest]:
    """Prototypical networks with the shapes of Omniglot and miniImageNet, on noise."""
    title = "{} steps of prototypical networks, {}-way {}-shot {} queries, {}x{}x{}"
    keys = ("steps", "way", "shot", "query", "channels", "size", "size")
    found = {}
    for name, shape in (("protonet_omniglot", OMNIGLOT), ("protonet_miniimagenet", MINIIMAGENET)):
        settings: dict[str, Any] = {"shape": shape}
        entrants = [
            Entrant("ours, through Lightning", through_lightning, settings, keep_memory=True),
            Entrant("ours, bare loop", bare_loop, settings, keep_memory=True),
            Entrant("textbook", textbook, settings),
        ]
        steps = (shape["steps"], "steps")
        heading = title.format(*(shape[key] for key in keys))
        found[name] = Contest(heading, entrants, steps, tolerance=5e-3, pause=1.0, counted=1)
    episodes = {"shape": OMNIGLOT, "episodes": 100}
    found["episodes"] = Contest(
        "Making 100 training episodes, 60-way 1-shot 5 queries, 1x28x28",
        [
            Entrant("ours", make_episodes, episodes, keep_memory=True),
            Entrant("textbook", textbook_make_episodes, episodes),
        ],
        (100, "episodes"),
    )
    settings = {"shape": EVALUATION, "episodes": 500}
    found["evaluation"] = Contest(
        "Test of prototypical networks, 500 episodes, 5-way 1-shot 15 queries, 1x28x28",
        [
            Entrant("ours, through Lightning", evaluate, settings, keep_memory=True),
            Entrant("textbook", textbook_evaluate, settings),
        ],
        (500, "episodes"),
        tolerance=2e-3,
    )
    found["bank"] = Contest(
        "Reading 2,000 JPEG files of 84x84",
        [
            Entrant("ours: image bank, built", build_bank, {"images": 2000}),
            Entrant("textbook: into one array", textbook_build, {"images": 2000}),
        ],
        (2000, "images"),
    )
    return found


def device_contests(device: str) -> dict[str, Contest]:
    """Training steps of prototypical and matching networks on a GPU."""
    title = "{} steps of {}, {}-way {}-shot {} queries, {}x{}x{}"
    keys = ("way", "shot", "query", "channels", "size", "size")
    contests = {}
    for name, method, words, shape in (
        ("protonet_omniglot", "protonet", "prototypical networks", {**OMNIGLOT, "steps": 50}),
        ("protonet_miniimagenet", "protonet", "prototypical networks", {**MINIIMAGENET, "steps": 20}),
        ("matching_omniglot", "matching", "matching networks", {**MATCHING, "steps": 50}),
    ):
        settings = {"shape": shape, "device": device}
        bare = [Entrant("ours, bare loop", bare_loop, settings)] if method == "protonet" else []
        entrants = [
            Entrant("ours, through Lightning", through_lightning, {**settings, "method": method}),
            *bare,
            Entrant("textbook", textbook, {**settings, "method": method}),
        ]
        # A GPU rounds convolutions to TF32, and rounding differences grow with each step.
        contests[name] = Contest(
            title.format(shape["steps"], words, *(shape[key] for key in keys)),
            entrants,
            (shape["steps"], "episodes"),
            tolerance=0.2,
            pause=0.2,
        )
    return contests


def _config(
    shape: dict[str, Any], episodes: int, test: int = 2, method: str = "protonet", device: str = "cpu"
) -> DictConfig:
    run_dir = tempfile.mkdtemp()
    task = [f"{key}={shape[key]}" for key in ("way", "shot", "query")]
    return compose(
        *task,
        *(f"train.{override}" for override in task),
        f"train.episodes={episodes}",
        f"val.every={episodes}",
        f"checkpoint_every={episodes}",
        f"test.episodes={test}",
        f"dataset.size={shape['size']}",
        f"dataset.channels={shape['channels']}",
        f"method={method}",
        f"hardware={'cpu' if device == 'cpu' else 'gpu'}",
        f"optimizer.lr={LEARNING_RATE}",
        "schedule=none",
        f"run_dir={run_dir}",
    )


def _data(config: DictConfig, shape: dict[str, Any]) -> EpisodeDataModule:
    data = make_data(config)
    data._bank = _noise(shape)
    return data


def _method(config: DictConfig, shape: dict[str, Any]) -> FewShotMethod:
    method = make_method(config)
    copy_weights(_textbook(shape), method)
    return method


def _textbook(shape: dict[str, Any]) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return textbook_conv4(shape["channels"], shape["size"])


def _noise(shape: dict[str, Any]) -> ImageBank:
    """Make a bank of fixed noise."""
    count = shape["classes"] * shape["images"]
    pixels = np.random.default_rng(0).integers(
        0, 256, (count, shape["size"], shape["size"], shape["channels"]), dtype=np.uint8
    )
    offsets = np.arange(0, count + 1, shape["images"])
    held_out = shape["classes"] // 5
    splits = ["train"] * (shape["classes"] - 2 * held_out) + ["val"] * held_out + ["test"] * held_out
    return ImageBank(torch.from_numpy(pixels), offsets, tuple(map(str, range(shape["classes"]))), tuple(splits))


def _episodes(shape: dict[str, Any], split: str = "train") -> EpisodeDataset:
    return EpisodeDataset(_noise(shape), split, shape["way"], shape["shot"], shape["query"], seed=0)


def _png_loader(
    shape: dict[str, Any], episodes: int, split: str = "train", workers: int = 2, pin_memory: bool = False
) -> DataLoader[Episode]:
    """Load the same episodes from one file per image."""
    folder = Path(tempfile.gettempdir()) / f"images{shape['size']}"
    bank = _noise(shape)
    if not folder.exists():
        folder.mkdir()
        for number, pixels in enumerate(bank.images.numpy()):
            Image.fromarray(pixels.squeeze()).save(folder / f"{number}.png", compress_level=1)
    dataset = PngEpisodes(_episodes(shape, split), folder)
    sampler = [EpisodeNumber(0, number) for number in range(episodes)]
    # An entrant's process was spawned, and would spawn workers, which import PyTorch again whenever they start.
    context = "fork" if sys.platform == "linux" else None
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=context,
    )


def _jpegs(images: int) -> Path:
    """Write images of noise, one folder per class."""
    folder = Path(tempfile.gettempdir()) / f"jpegs-{os.getpid()}"  # entrants start at the same time
    if not folder.exists():
        random = np.random.default_rng(0)
        for number in range(images):
            split = "train" if number < images - 40 else "val" if number < images - 20 else "test"
            class_folder = folder / "miniimagenet" / split / f"{split}{number // 20:05d}"
            class_folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (84, 84, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(class_folder / f"{number:05d}.jpg")
    return folder


def _quietly(act: Any) -> None:
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        act()
