"""Omniglot (Lake et al., 2015): 1,623 hand-written characters of 50 alphabets, each drawn by 20 people."""

import hashlib
import re
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from fewshot.data.files import ImageFile, file_at, is_archive, list_archive
from fewshot.data.images import decode
from fewshot.data.locate import IMAGES, Place, contents, places, plain_name
from fewshot.errors import FewShotError, shortened
from fewshot.text import say

FOLDERS = ("omniglot", "omniglot-py")  # searched before others with such a name; the second is torchvision's
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
CHARACTER = re.compile(r"character\d+", re.IGNORECASE)
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
    """Find Omniglot in or below ``data_dir``, or download it there.

    A drawing is recognised by its path, ``.../ALPHABET/characterNN/FILE.png``, in folders or in archives. What is above
    the alphabets does not matter: ``images_background`` and ``images_evaluation``, Lake's repository with its
    ``python/*.zip``, all alphabets in one folder, or the folders of a split.

    Args:
        data_dir: a folder named after Omniglot, one that contains it, or an archive of it.
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
    parts = _find(Path(data_dir).expanduser())

    def classes() -> list[ImageClass]:
        background, evaluation = (part.characters() for part in parts)
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

    return Source(list(dict.fromkeys(file for part in parts for file in part.files())), classes, split)


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


@dataclass(frozen=True)
class _Part:
    """The background or the evaluation set in a folder.

    Attributes:
        name: a key of ``ALPHABETS``.
        place: the folder.
        loose: the drawings of each character "alphabet/character" outside of archives.
        archives: paths in the folder of the archives that may contain others, the likeliest first.
    """

    name: str
    place: Place
    loose: dict[str, list[ImageFile]]
    archives: list[str]

    def files(self) -> list[Path]:
        """The files that the drawings depend on."""
        used = [Path(file.name) for drawings in self.loose.values() for file in drawings]
        return used if self.is_whole() else used + [self.place.path / name for name in self.archives]

    def is_whole(self) -> bool:
        """Whether there is nothing to look for in archives."""
        return not self._wrong(self.loose)

    def likelihood(self) -> int:
        """How likely the part is there, from 0 to 2; archives with telling names are not opened to find out."""
        named = bool(self.archives) and _part_of(self.archives[0]) == self.name
        return 2 if named or self.is_whole() else 1 if self.loose else 0

    def characters(self) -> dict[str, list[ImageFile]]:
        """The drawings of every character.

        Raises:
            FewShotError: they are not complete; or an archive is broken or not to be trusted.
        """
        tree = {name: file for name, file in self.place.files.items() if not is_archive(name)}
        found, archives = self.loose, iter(self.archives)
        while wrong := self._wrong(found):
            archive = next(archives, None)
            if archive is None:
                where = _commonest_folder(found, self.place.path)
                fix = "unpack it again" if where.is_dir() else "fetch it again"
                expected = sum(ALPHABETS[self.name].values())
                counts = f"{len(found)} of the {expected} characters of {self.name}: " if len(found) != expected else ""
                raise FewShotError(f"{where} has {counts}{shortened(wrong)}; {fix}")
            members = list_archive(self.place.path / archive)
            found = _drawings(tree := tree | {f"{archive}/{name}": file for name, file in members.items()}, self.name)
            nested = [name for name in members if is_archive(name) and _part_of(name) in (self.name, None)]
            if nested and not found and archive == self.archives[-1]:
                raise FewShotError(f"{self.place.path / archive} contains archives, such as {nested[0]}: unpack it")
        return found

    def _wrong(self, found: Mapping[str, Sequence[ImageFile]]) -> list[str]:
        counts = Counter(character.split("/")[0] for character in found)
        wrong = [
            f"{counts[name]} of {count} of {name}"
            for name, count in ALPHABETS[self.name].items()
            if counts[name] != count
        ]
        return wrong or [
            f"{len(drawings)} of {DRAWERS} drawings of {character}"
            for character, drawings in found.items()
            if len(drawings) != DRAWERS
        ]


def _commonest_folder(found: Mapping[str, Sequence[ImageFile]], default: Path) -> Path:
    """Return the folder or archive that most of the characters are in."""
    above: Counter[Path] = Counter()
    for drawings in found.values():
        archive, separator, _ = drawings[0].name.rpartition(":")
        above[Path(archive) if separator and is_archive(archive) else Path(drawings[0].name).parents[2]] += 1
    return above.most_common(1)[0][0] if above else default


def _drawings(files: Mapping[str, ImageFile], part: str) -> dict[str, list[ImageFile]]:
    """Return the drawings of each character "alphabet/character" of a part.

    If a character is in several folders, as in Lake's smaller background sets, the folder with most characters counts
    in which it is complete.
    """
    alphabets = {plain_name(name): name for name in ALPHABETS[part]}
    folders: dict[str, dict[str, list[ImageFile]]] = defaultdict(lambda: defaultdict(list))
    for path, file in files.items():
        *above, alphabet, character, _ = ["", "", *path.split("/")]
        name = alphabets.get(plain_name(alphabet))
        if name and CHARACTER.fullmatch(character) and path.lower().endswith(IMAGES):
            folders["/".join(above)][f"{name}/{character.lower()}"].append(file)
    found: dict[str, list[ImageFile]] = {}
    for _, characters in sorted(folders.items(), key=lambda item: (-len(item[1]), item[0].count("/"), item[0])):
        for character, drawings in characters.items():
            if character not in found or len(drawings) == DRAWERS != len(found[character]):
                found[character] = drawings
    return found


def _part_of(path: str) -> str | None:
    """Return the part that a folder or an archive is named after."""
    name = plain_name(path.rstrip("/").rpartition("/")[2])
    return next((part for part in ALPHABETS if plain_name(part) in name), None)


def _belongs(path: Path) -> bool:
    """Whether a folder or an archive without Omniglot in its name may be a part of it."""

    def is_part(name: str) -> bool:
        return _part_of(name) is not None or any(
            plain_name(name) == plain_name(a) for p in ALPHABETS.values() for a in p
        )

    return is_part(path.name) or (path.is_dir() and any(map(is_part, contents(path))))


def _find(root: Path) -> list[_Part]:
    """Find both parts; they may be in different folders. Download what is in none."""
    searched: list[Place] = []
    candidates: dict[str, list[_Part]] = {name: [] for name in ALPHABETS}
    for place in places(root, "omniglot", FOLDERS, _belongs):
        searched.append(place)
        for name, parts in candidates.items():
            parts.extend(_part_in(place, name))
        if all(any(part.likelihood() == 2 for part in parts) for parts in candidates.values()):
            break
    return [
        max(parts, key=_Part.likelihood) if parts else _fetched(root, searched, name)
        for name, parts in candidates.items()
    ]


def _part_in(place: Place, name: str) -> Iterator[_Part]:
    loose = _drawings({path: file for path, file in place.files.items() if not is_archive(path)}, name)
    archives = [path for path in place.archives() if _part_of(path) in (name, None) and "strokes" not in path.lower()]
    archives.sort(key=lambda path: (_part_of(path) is None, len(path), path))
    if loose or archives:
        yield _Part(name, place, loose, archives)


def _fetched(root: Path, searched: Sequence[Place], part: str) -> _Part:
    """Download a part into the folder that is named after Omniglot."""
    if root.is_file():
        raise FewShotError(f"{root} contains nothing of Omniglot's {part}; fetch it again")
    if _part_of(root.name) not in (None, part) and part in map(_part_of, contents(root.parent)):
        raise FewShotError(f"{root} is half of Omniglot, and {part} is next to it: choose data_dir={root.parent}")
    folder = next((place.path for place in searched if place.named), root / FOLDERS[0])
    archive = _download(folder, part)
    return _Part(part, Place(folder, True, {archive.name: file_at(archive)}), {}, [archive.name])


def _download(folder: Path, part: str) -> Path:
    """Fetch one of the official zips; it appears under its name only when its checksum is right."""
    archive = folder / f"{part}.zip"
    url = f"{Omniglot.download_url_prefix}/{archive.name}"
    lock = folder / f".{part}.lock"
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not archive.exists():
                _fetch(url, archive, Omniglot.zips_md5[part])
    except (OSError, RuntimeError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        present = contents(folder)
        where = (
            f"{folder} contains {shortened(present)}, but not {part}, which"
            if present
            else f"Omniglot is not in {folder} and"
        )
        raise FewShotError(
            f"{where} cannot be downloaded from {url}: {reason}; put {archive.name} there, or name the folder that "
            "contains Omniglot with data_dir=PATH"
        ) from error
    finally:
        with suppress(OSError):  # only empty folders are removed
            lock.unlink(missing_ok=True)
            for created_folder in created:
                created_folder.rmdir()
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
