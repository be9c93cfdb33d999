"""Omniglot (Lake et al., 2015): 1,623 hand-written characters of 50 alphabets, each drawn by 20 people."""

import hashlib
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torchvision.datasets import Omniglot
from torchvision.datasets.utils import download_url

from fewshot.data.bank import ImageClass, Source
from fewshot.data.files import ImageFile, list_folder, list_zip
from fewshot.data.images import decode
from fewshot.errors import FewShotError

FOLDERS = ("omniglot", "omniglot-py")  # under data_dir; the second is torchvision's
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
DRAWERS = 20
TRAIN_CHARACTERS = 1200
PAUSES = (1, 4)  # seconds before a download is tried again
SILENCE = 60  # seconds after which a server that sends nothing is given up


def omniglot(data_dir: str, size: int, split: str, split_seed: int, val_characters: int, rotations: bool) -> Source:
    """Find Omniglot below ``data_dir``, as folders or zips, or download it there.

    Args:
        data_dir: holds ``omniglot/`` or ``omniglot-py/`` with ``images_background`` and ``images_evaluation``,
            each a zip or the folder it unpacks to.
        size: height and width of the images; ink is bright on black.
        split: "vinyals": 1,200 characters drawn from all alphabets to train, 423 to test, as in Vinyals et al.
            (arXiv 1606.04080), whose own draw was never published; "lake": background to train, evaluation to test.
        split_seed: the draw of the characters.
        val_characters: how many of the training characters are held out for validation.
        rotations: add each character turned by 90, 180 and 270 degrees as new classes of the same split.

    Raises:
        FewShotError: the files are incomplete or cannot be downloaded, or the split is unknown.
    """
    if split not in ("vinyals", "lake"):
        raise FewShotError(f"dataset.source.split={split} is unknown: choose vinyals or lake")
    places = [_find(Path(data_dir).expanduser(), part) for part in CHARACTERS]
    files: list[Path] = []
    for place in places:
        files += [place / name for name in list_folder(place)] if place.is_dir() else [place]

    def classes() -> list[ImageClass]:
        background, evaluation = (_characters(place) for place in places)
        drawings = background | evaluation
        splits = split_characters(list(background), list(evaluation), split, split_seed, val_characters)
        listed = []
        for name, of in splits.items():
            for character in of:
                read = lru_cache(1)(partial(_read, drawings[character], size))
                for turn in range(4 if rotations else 1):
                    load = partial(_turned, read, turn)
                    listed.append(ImageClass(f"{character}@{90 * turn}", name, DRAWERS, load))
        return listed

    return Source(files, classes)


def split_characters(
    background: Sequence[str], evaluation: Sequence[str], split: str, seed: int, val_characters: int
) -> dict[str, list[str]]:
    """Deal characters out to "train", "val" and "test"; a hash of seed and name decides, on every machine alike."""

    def shuffled(characters: Sequence[str]) -> list[str]:
        return sorted(characters, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())

    if split == "vinyals":
        order = shuffled([*background, *evaluation])
        train, test = order[:TRAIN_CHARACTERS], order[TRAIN_CHARACTERS:]
    else:
        train, test = shuffled(background), shuffled(evaluation)
    if not 0 < val_characters < len(train):
        raise FewShotError(
            f"dataset.source.val_characters={val_characters} must lie between 1 and {len(train) - 1}, "
            f"since the {split} split has {len(train)} characters to train and validate on"
        )
    kept = len(train) - val_characters
    return {"train": sorted(train[:kept]), "val": sorted(train[kept:]), "test": sorted(test)}


def _read(drawings: Sequence[ImageFile], size: int) -> NDArray[np.uint8]:
    return 255 - np.stack([decode(file, size, channels=1) for file in drawings])


def _turned(read: Callable[[], NDArray[np.uint8]], quarters: int) -> NDArray[np.uint8]:
    return np.rot90(read(), quarters, axes=(1, 2))


def _characters(place: Path) -> dict[str, list[ImageFile]]:
    """The drawings of every character "alphabet/character" of one part, checked to be complete."""
    listed = list_folder(place) if place.is_dir() else list_zip(place)
    characters = defaultdict(list)
    for name, file in listed.items():
        if name.endswith(".png") and name.count("/") >= 2:
            characters["/".join(name.split("/")[-3:-1])].append(file)
    mend = f"unpack it again, or remove {place} and it is downloaded" if place.is_dir() else "fetch it again"
    expected = CHARACTERS[place.stem]
    if len(characters) != expected:
        raise FewShotError(f"{place} holds {len(characters)} characters instead of {expected}: {mend}")
    for character, drawings in characters.items():
        if len(drawings) != DRAWERS:
            raise FewShotError(f"{place} holds {len(drawings)} drawings of {character} instead of {DRAWERS}: {mend}")
    return dict(characters)


def _find(data_dir: Path, part: str) -> Path:
    for folder in FOLDERS:
        for name in (part, f"{part}.zip"):
            if (data_dir / folder / name).exists():
                return data_dir / folder / name
    return _download(data_dir / FOLDERS[0], part)


def _download(folder: Path, part: str) -> Path:
    """Fetch one of the official zips; it appears under its name only when its checksum is right."""
    archive = folder / f"{part}.zip"
    url = f"{Omniglot.download_url_prefix}/{archive.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{part}.lock"):
            if not archive.exists():
                _fetch(url, archive, Omniglot.zips_md5[part])
    except (OSError, RuntimeError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise FewShotError(
            f"Omniglot is not in {folder} and cannot be downloaded from {url}: {reason}; "
            f"put {archive.name} there, or name the folder that holds omniglot/ with data_dir=PATH"
        ) from error
    return archive


def _fetch(url: str, archive: Path, checksum: str) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        for pause in (*PAUSES, None):
            try:
                with tempfile.TemporaryDirectory(dir=archive.parent) as fresh:
                    download_url(url, fresh, archive.name, checksum)
                    Path(fresh, archive.name).replace(archive)
                break
            except (URLError, ConnectionError, TimeoutError, HTTPException, RuntimeError) as error:
                if pause is None:
                    raise
                print(f"{url}: {error}; trying again in {pause} s", flush=True)
                time.sleep(pause)
    finally:
        socket.setdefaulttimeout(timeout)
