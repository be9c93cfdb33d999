"""Omniglot (Lake et al., 2015): 1,623 hand-written characters of 50 alphabets, each drawn by 20 people."""

import hashlib
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from torchvision.datasets import Omniglot
from torchvision.datasets.utils import download_url

from fewshot.data.bank import ImageClass, Source, bright_ink
from fewshot.data.files import ImageFile, list_folder, list_zip
from fewshot.data.images import decode
from fewshot.errors import FewShotError, shortened
from fewshot.text import say

FOLDERS = ("omniglot", "omniglot-py")  # under data_dir; the second is torchvision's
# How many characters each alphabet has. They are numbered from 1 without gaps.
ALPHABETS = {
    "images_background": {
        "Alphabet_of_the_Magi": 20,
        "Anglo-Saxon_Futhorc": 29,
        "Arcadian": 26,
        "Armenian": 41,
        "Asomtavruli_(Georgian)": 40,
        "Balinese": 24,
        "Bengali": 46,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Braille": 26,
        "Burmese_(Myanmar)": 34,
        "Cyrillic": 33,
        "Early_Aramaic": 22,
        "Futurama": 26,
        "Grantha": 43,
        "Greek": 24,
        "Gujarati": 48,
        "Hebrew": 22,
        "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Japanese_(hiragana)": 52,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Malay_(Jawi_-_Arabic)": 40,
        "Mkhedruli_(Georgian)": 41,
        "N_Ko": 33,
        "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Sanskrit": 42,
        "Syriac_(Estrangelo)": 23,
        "Tagalog": 17,
        "Tifinagh": 55,
    },
    "images_evaluation": {
        "Angelic": 20,
        "Atemayar_Qelisayer": 26,
        "Atlantean": 26,
        "Aurek-Besh": 26,
        "Avesta": 26,
        "Ge_ez": 26,
        "Glagolitic": 45,
        "Gurmukhi": 45,
        "Kannada": 41,
        "Keble": 26,
        "Malayalam": 47,
        "Manipuri": 40,
        "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45,
        "Oriya": 46,
        "Sylheti": 28,
        "Syriac_(Serto)": 23,
        "Tengwar": 25,
        "Tibetan": 42,
        "ULOG": 26,
    },
}
DRAWERS = 20
SPLITS = ("vinyals", "lake", "random")
TRAIN_CHARACTERS = 1200  # of the vinyals and random splits, validation included
VAL_CHARACTERS = 172  # of the lake and random splits, where nothing else is asked for: as many as vinyals has
VAL_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")  # of the vinyals split
PAUSES = (1, 4)  # seconds before a download is tried again
SILENCE = 60  # seconds after which a server that sends nothing is given up


@bright_ink
def omniglot(
    data_dir: str, size: int, split: str, split_seed: int | None, val_characters: int | None, rotations: bool
) -> Source:
    """Find Omniglot below ``data_dir``, as folders or zips, or download it there.

    Args:
        data_dir: holds ``omniglot/`` or ``omniglot-py/`` with ``images_background`` and ``images_evaluation``,
            each a zip or the folder it unpacks to.
        size: height and width of the images; ink is bright on black.
        split: see ``split_characters``.
        split_seed: the ``seed`` there.
        val_characters: as there.
        rotations: add each character turned by 90, 180 and 270 degrees as new classes of the same split.

    Raises:
        FewShotError: the files are incomplete or cannot be downloaded, or the split is unknown.
    """
    if split not in SPLITS:
        raise FewShotError(f"dataset.source.split={split} is unknown: choose {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    if split == "vinyals" and (split_seed, val_characters) != (None, None):
        raise FewShotError(
            "dataset.source.split=vinyals is a fixed list, on which dataset.source.split_seed and "
            "dataset.source.val_characters have no effect: leave them out, or choose split=random or split=lake"
        )
    places = [_find(Path(data_dir).expanduser(), part) for part in ALPHABETS]
    files: list[Path] = []
    for place in places:
        files += [place / name for name in list_folder(place)] if place.is_dir() else [place]

    def classes() -> list[ImageClass]:
        background, evaluation = (_characters(place) for place in places)
        drawings = background | evaluation
        splits = split_characters(list(background), list(evaluation), split, split_seed, val_characters)
        listed = []
        for name, characters in splits.items():
            for character in characters:
                read = lru_cache(1)(partial(_read, drawings[character], size))
                for turn in range(4 if rotations else 1):
                    load = partial(_turned, read, turn)
                    listed.append(ImageClass(f"{character}@{90 * turn}", name, DRAWERS, load))
        return listed

    return Source(files, classes, split)


def split_characters(
    background: Sequence[str],
    evaluation: Sequence[str],
    split: str,
    seed: int | None = None,
    val_characters: int | None = None,
) -> dict[str, list[str]]:
    """Assign characters to "train", "val" and "test", the same on every machine.

    Args:
        background: the characters "alphabet/character" of the background set, in any order.
        evaluation: those of the evaluation set.
        split: "vinyals": alphabets in alphabetical order, the background set's first, and characters in order: the
            first 1,200 to train and validate, the last 423 to test; validation is five alphabets. These are the lists
            published with the code of Snell et al. (arXiv 1703.05175), who follow Vinyals et al. (arXiv 1606.04080).
            "lake": background to train and validate, evaluation to test, as Lake et al. (2015) divide it; the
            article of ``conf/report.yaml`` trains and tests so, without validation. "random": 1,200 characters drawn
            from all alphabets to train and validate, 423 to test. The code of Finn et al. (arXiv 1703.03400) draws
            1,100 / 100 / 423 in this way. It is easier than the others: the test's alphabets were trained on.
        seed: draws the characters of "random", and the validation characters of "lake"; None: 0.
        val_characters: how many of the training characters "random" and "lake" hold out for validation; None: 172.

    Raises:
        FewShotError: no character would be left to train on.
    """
    ordered = [*_in_order(background), *_in_order(evaluation)]
    if split == "vinyals":
        known, test = ordered[:TRAIN_CHARACTERS], ordered[TRAIN_CHARACTERS:]
        val = [character for character in known if character.split("/")[0] in VAL_ALPHABETS]
        return {"train": [character for character in known if character not in val], "val": val, "test": test}

    def shuffled(characters: Sequence[str]) -> list[str]:
        return sorted(characters, key=lambda name: hashlib.sha256(f"{seed or 0}/{name}".encode()).digest())

    if split == "random":
        order = shuffled(ordered)
        known, test = order[:TRAIN_CHARACTERS], order[TRAIN_CHARACTERS:]
    else:
        known, test = shuffled(background), list(evaluation)
    held_out = VAL_CHARACTERS if val_characters is None else val_characters
    if not 0 < held_out < len(known):
        raise FewShotError(
            f"dataset.source.val_characters={held_out} must lie between 1 and {len(known) - 1}, "
            f"since the {split} split has {len(known)} characters to train and validate on"
        )
    kept = len(known) - held_out
    return {"train": sorted(known[:kept]), "val": sorted(known[kept:]), "test": sorted(test)}


def _in_order(characters: Sequence[str]) -> list[str]:
    return sorted(characters, key=lambda character: character.split("/"))


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
    found = Counter(character.split("/")[0] for character in characters)
    expected = ALPHABETS[place.stem]
    fix = "unpack it again" if place.is_dir() else "fetch it again"
    wrong = [f"{found[name]} of {count} of {name}" for name, count in expected.items() if found[name] != count]
    wrong += [f"{count} of {name}, which is no alphabet of it" for name, count in found.items() if name not in expected]
    if wrong:
        total = sum(expected.values())
        raise FewShotError(f"{place} holds {len(characters)} characters instead of {total}: {shortened(wrong)}; {fix}")
    wrong = [f"{len(of_one)} of {name}" for name, of_one in characters.items() if len(of_one) != DRAWERS]
    if wrong:
        raise FewShotError(f"{place} does not hold {DRAWERS} drawings of each character: {shortened(wrong)}; {fix}")
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
    lock = folder / f".{part}.lock"
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not archive.exists():
                _fetch(url, archive, Omniglot.zips_md5[part])
    except (OSError, RuntimeError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise FewShotError(
            f"Omniglot is not in {folder} and cannot be downloaded from {url}: {reason}; "
            f"put {archive.name} there, or name the folder that holds omniglot/ with data_dir=PATH"
        ) from error
    finally:
        with suppress(OSError):  # the first that is not empty is as far as this goes
            lock.unlink(missing_ok=True)
            for one in made:
                one.rmdir()
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
                say(f"{url}: {error}; trying again in {pause} s")
                time.sleep(pause)
    finally:
        socket.setdefaulttimeout(timeout)
