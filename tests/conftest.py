"""What the tests share: synthetic banks, the real data where it lies, and the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fewshot.config import ROOT
from fewshot.data.bank import ImageBank

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real Omniglot and miniImageNet."""
    for place in (os.environ.get("FEWSHOT_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if place and (Path(place) / "omniglot").exists() and (Path(place) / "miniimagenet").exists():
            return Path(place)
    if os.environ.get("FEWSHOT_REQUIRE_DATA"):
        pytest.fail("the real data was not found, and FEWSHOT_REQUIRE_DATA asks for it")
    pytest.skip("no real data: neither FEWSHOT_DATA_DIR nor ../shared/data holds omniglot/ and miniimagenet/")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of image banks that the whole session shares."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def cli(cache_dir: Path) -> Cli:
    """Runs ``python src/SCRIPT ARGUMENTS``, from any directory, as a user would."""

    def run(*arguments: object, script: str = "train.py", **options: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FEWSHOT_CACHE_DIR": str(cache_dir), "COLUMNS": "150"}
        command = [sys.executable, str(ROOT / "src" / script), *map(str, arguments)]
        return subprocess.run(  # type: ignore[call-overload]
            command, **{"capture_output": True, "text": True, "timeout": 500, "env": environment, **options}
        )

    return run


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
    """Size and time of change of all below ``folder``, itself included; what tells whether something was written."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}
