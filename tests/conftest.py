"""Shared by the tests: synthetic banks, real data, and the command line."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import programs
from fewshot.config import ROOT, compose
from fewshot.data.bank import ImageBank
from fewshot.training import train

Cli = Callable[..., subprocess.CompletedProcess[str]]

CHROMIUM = [
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1400,900"),
    *("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"),  # a camera
]

# How many bad inputs the fuzz tests try in total; FEWSHOT_FUZZ=10000 requests new ones in every run.
FUZZ = int(os.environ.get("FEWSHOT_FUZZ", "300"))
FUZZ_TESTS = 5
settings.register_profile(
    "fuzz",
    max_examples=-(-FUZZ // FUZZ_TESTS),
    derandomize="FEWSHOT_FUZZ" not in os.environ,
    deadline=None,
    # Explaining a failure traces every line: ten times slower, a hang where an example takes a second.
    phases=[phase for phase in Phase if phase is not Phase.explain],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fuzz")


def layout_faults(figure: Figure) -> list[str]:
    """Return what is illegible in a figure: texts that overlap or leave the page, and legends over other panels."""
    drawn: dict[int, Text] = {}
    draw = Text.draw

    def record(text: Text, *given: Any, **named: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn[id(text)] = text
        draw(text, *given, **named)

    canvas = FigureCanvasAgg(figure)
    with patch.object(Text, "draw", record):
        canvas.draw()
    # A pixel of overlap is rounding.
    boxes = {id(text): text.get_window_extent().padded(-1) for text in drawn.values()}
    legends = [part for part in figure.findobj(Legend) if part.get_visible()]
    frames = [(f"the legend with {_words(part.get_texts()[0])}", part.get_window_extent()) for part in legends]
    faults = [
        f"{name} leaves the page"
        for name, box in [*((_words(text), boxes[key]) for key, text in drawn.items()), *frames]
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]
    faults += [
        f"{_words(first)} and {_words(second)} overlap"
        for first, second in combinations(drawn.values(), 2)
        if _overlap(boxes[id(first)], boxes[id(second)])
    ]
    for part, (name, box) in zip(legends, frames, strict=True):
        panels = [axes for axes in figure.axes if axes.get_visible() and axes is not part.axes]
        faults += [f"{name} lies over a panel" for axes in panels if _overlap(box.padded(-1), axes.get_window_extent())]
        inside = {id(text) for text in part.findobj(Text)}
        faults += [
            f"{name} lies over {_words(text)}"
            for key, text in drawn.items()
            if key not in inside and _overlap(box.padded(-1), boxes[key])
        ]
    return faults


def _words(text: Text) -> str:
    return repr(text.get_text())


def _overlap(a: Bbox, b: Bbox) -> bool:
    return min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0)


@pytest.fixture
def legible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every figure saved by a test is legible."""
    savefig = Figure.savefig

    def check(figure: Figure, *given: Any, **named: Any) -> None:
        faults = layout_faults(figure)
        assert not faults, faults
        savefig(figure, *given, **named)

    monkeypatch.setattr(Figure, "savefig", check)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of the real Omniglot and miniImageNet."""
    for path in (os.environ.get("FEWSHOT_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if path and (Path(path) / "omniglot").exists() and (Path(path) / "miniimagenet").exists():
            return Path(path)
    if os.environ.get("FEWSHOT_REQUIRE_DATA"):
        pytest.fail("the real data was not found, and FEWSHOT_REQUIRE_DATA asks for it")
    pytest.skip("no real data: neither FEWSHOT_DATA_DIR nor ../shared/data holds omniglot/ and miniimagenet/")


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of image banks for the whole session and all of its processes, which is also the default one."""
    path = tmp_path_factory.getbasetemp()
    path = (path.parent if "PYTEST_XDIST_WORKER" in os.environ else path) / "cache"
    path.mkdir(exist_ok=True)
    os.environ["FEWSHOT_CACHE_DIR"] = str(path)
    return path


@pytest.fixture(scope="session")
def cli(cache_dir: Path) -> Cli:
    """Runs ``python src/SCRIPT ARGUMENTS``, from any directory, as a user would.

    ``fresh=True`` starts a new interpreter, which takes seconds; otherwise the process has the package imported.
    """

    def run(
        *arguments: object,
        script: str = "train.py",
        cwd: Path | str = ".",
        env: Mapping[str, str] = os.environ,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        environment = {**env, "FEWSHOT_CACHE_DIR": str(cache_dir), "COLUMNS": "150"}
        program, words = ROOT / "src" / script, [str(argument) for argument in arguments]
        if not fresh:
            return programs.call(program, words, cwd, environment, timeout=500)
        return subprocess.run(
            [sys.executable, program, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
        )

    return run


METHODS = {
    "protonet": ["method=protonet"],
    "matching": ["method=matching", "distance=scaled_cosine"],
    "matching_fce": ["method=matching_fce"],
    "maml": ["method=maml", "train.meta_batch=2"],
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Callable[[str], Path]:
    """Trains each of ``METHODS`` once, briefly; returns its run directory."""
    little = ["train.episodes=50", "train.way=5", "query=3", "encoder.filters=8", "val.episodes=2", "test.episodes=8"]
    runs: dict[str, Path] = {}

    def directory(method: str) -> Path:
        if method not in runs:
            runs[method] = tmp_path_factory.mktemp(method)
            train(compose(*METHODS[method], *little, f"run_dir={runs[method]}", f"cache_dir={cache_dir}"))
        return runs[method]

    return directory


def make_bank(counts: dict[str, list[int]], size: int = 16, channels: int = 1, seed: int = 0) -> ImageBank:
    """A bank of noise whose classes differ in brightness; ``counts`` has the images of each class of each split."""
    flat = [(split, count) for split, of_split in counts.items() for count in of_split]
    offsets = np.cumsum([0, *(count for _, count in flat)])
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (int(offsets[-1]), size, size, channels), generator=generator, dtype=torch.uint8)
    for number, (start, stop) in enumerate(pairwise(offsets)):
        images[start:stop, number % size] += 120
    return ImageBank(images, offsets, tuple(f"class {n}" for n in range(len(flat))), tuple(split for split, _ in flat))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of ``folder`` and everything below it, to detect writes."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[bytes], pieces: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of a file with up to four parts removed or overwritten, for example with ``pieces``."""
    contents = bytearray(draw(files))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(contents)))
        piece = draw(st.binary(max_size=9) | pieces)
        contents[start : start + draw(st.sampled_from([0, len(piece), 1, 40, 2000]))] = piece
    return bytes(contents)


TOUCHING = ("os", "shutil", "socket", "subprocess", "ctypes")  # audit events of these modules
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "socket.__new__")
_touched: list[str] | None = None


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _touched is None:
        return
    if event == "open":
        flags = arguments[2]
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _touched.append(f"open for writing: {arguments[0]!r}")
    elif event.partition(".")[0] in TOUCHING and event not in HARMLESS:
        _touched.append(f"{event}{arguments}"[:300])


@cache
def _start_auditing() -> None:
    sys.addaudithook(_audit)  # it cannot be removed


@contextmanager
def nothing_touched() -> Iterator[None]:
    """Fail if the block writes or removes a file, starts a program, or opens a connection."""
    global _touched  # noqa: PLW0603
    _start_auditing()
    _touched = []
    try:
        yield
        touched, _touched = _touched, None
        assert not touched
    finally:
        _touched = None


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install 'fewshot[dev]'")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: neither chromium with chromedriver nor google-chrome was found")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for argument in CHROMIUM:
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    chrome = selenium.Chrome(options, selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


def log_of(run_dir: Path) -> EventAccumulator:
    """TensorBoard's log of a run."""
    (folder,) = {path.parent for path in run_dir.glob("*/events.*")}
    log = EventAccumulator(str(folder), size_guidance={"images": 0})
    log.Reload()
    return log


def free_port() -> int:
    """A free port of this machine."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until a server listens on the port, three minutes at most."""
    for _ in range(900):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
