"""Images of one's own, in a folder: a folder a class."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewshot.data.bank import SPLITS, ImageClass, Source
from fewshot.data.files import ImageFile, list_folder
from fewshot.data.locate import children, splits_named
from fewshot.data.photos import read_photo
from fewshot.errors import FewShotError
from fewshot.text import say

FEWEST = 2  # classes of a split: less is no task


def folder(data_dir: str, size: int, channels: int, val: float, test: float, split_seed: int) -> Source:
    """Find the classes in a folder of one's own, and deal them out to training, validation and test.

    Args:
        data_dir: holds a folder a class; or ``train``, ``val`` and ``test``, each with a folder a class. A class may
            have folders within its folder.
        size: height and width of the images, see ``read_photo``.
        channels: 1 for grey, 3 for RGB.
        val: the share of the classes to validate on, at least two of them; not used where the folders say.
        test: the share of the classes to test on.
        split_seed: draws them.

    Raises:
        FewShotError: there is no such folder, or it has too few classes.
    """
    place = Path(data_dir).expanduser()
    if not place.is_dir():
        raise FewShotError(f"there is no folder {place}; name the one that holds a folder a class by data_dir=PATH")
    files = list_folder(place)
    images = {name: file for name, file in files.items() if name.lower().endswith(_endings())}
    others = sorted(set(files) - set(images))
    if others:
        say(f"passed over {len(others):,} files in {place} that no image is kept in, {others[0]} for one")
    folders = _split_folders(place)
    splits = _as_the_folders_say(images, folders) if folders else _dealt_out(images, place, val, test, split_seed)
    for split in SPLITS:
        if len(splits.get(split, {})) < FEWEST:
            raise FewShotError(
                f"{place / split} has {len(splits.get(split, {}))} folders with images, and at least {FEWEST} classes "
                "are needed there; move some over"
            )

    def classes() -> list[ImageClass]:
        return [
            ImageClass(name, split, len(of), partial(_load, of, size, channels))
            for split in SPLITS
            for name, of in splits[split].items()
        ]

    return Source([place / name for name in images], classes, "folders" if folders else f"drawn, seed {split_seed}")


def by_class(files: Mapping[str, ImageFile]) -> dict[str, list[ImageFile]]:
    """Gather files by the first folder of their paths; those that lie in none are left out."""
    classes = defaultdict(list)
    for name, file in files.items():
        first, _, rest = name.partition("/")
        if rest:
            classes[first].append(file)
    return dict(sorted(classes.items()))


def _split_folders(place: Path) -> dict[str, str]:
    """The folder of each split, by whichever word for it people use; empty where the folders are classes.

    Raises:
        FewShotError: there are folders of some splits, and none or several of another.
    """
    folders = children(place)
    named = splits_named(folders)
    exact = {split: split if split in of else of[0] for split, of in named.items() if split in of or len(of) == 1}
    if named and len(exact) < len(SPLITS):
        missing = next(split for split in SPLITS if split not in exact)
        raise FewShotError(
            f"{place} has the folders {', '.join(name for of in named.values() for name in of)}, which are splits and "
            f"no classes, but not one that is {missing}; let it hold train, val and test, each with a folder a class"
        )
    return exact


def _as_the_folders_say(
    images: Mapping[str, ImageFile], folders: Mapping[str, str]
) -> dict[str, dict[str, list[ImageFile]]]:
    splits = {}
    for split, folder_of in folders.items():
        inside = {name: file for name, file in images.items() if name.startswith(f"{folder_of}/")}
        splits[split] = by_class({name.removeprefix(f"{folder_of}/"): file for name, file in inside.items()})
    return splits


def _dealt_out(
    images: Mapping[str, ImageFile], place: Path, val: float, test: float, seed: int
) -> dict[str, dict[str, list[ImageFile]]]:
    """A hash of seed and name decides, on every machine alike."""
    classes = by_class(images)
    counts = {split: max(FEWEST, round(share * len(classes))) for split, share in (("val", val), ("test", test))}
    if len(classes) - sum(counts.values()) < FEWEST:
        least = len(SPLITS) * FEWEST
        enough = (
            f"lower dataset.source.val={val} and dataset.source.test={test}" if len(classes) >= least else "add some"
        )
        raise FewShotError(
            f"{place} has {len(classes)} folders with images, too few classes to train, validate and test on "
            f"different ones ({least} at least, better 20): {enough}; or tell these few apart without training, by "
            f"python src/predict.py encoder=pretrained method=protonet support={place} query=..."
        )
    order = sorted(classes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest())
    parts = {"val": order[: counts["val"]], "test": order[counts["val"] : sum(counts.values())]}
    parts["train"] = order[sum(counts.values()) :]
    return {split: {name: classes[name] for name in sorted(names)} for split, names in parts.items()}


def _load(files: Sequence[ImageFile], size: int, channels: int) -> NDArray[np.uint8]:
    return np.stack([read_photo(file, size, channels) for file in files])


@cache
def _endings() -> tuple[str, ...]:
    """Of the files that Pillow can read."""
    Image.init()
    return tuple(ending for ending, format_ in Image.EXTENSION.items() if format_ in Image.OPEN)
