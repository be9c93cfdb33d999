"""miniImageNet (Vinyals et al., 2016) in the split of Ravi & Larochelle (2017): 64 + 16 + 20 classes."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewshot.data.bank import SPLITS, ImageClass, Source
from fewshot.data.files import ImageFile, list_folder, list_zip, plain, read_file
from fewshot.data.images import decode, to_pixels
from fewshot.data.pickles import to_array, to_list, unpickle
from fewshot.errors import FewShotError

FOLDERS = ("miniimagenet", "mini-imagenet", "mini_imagenet", "miniImageNet")  # under data_dir
IMAGES = (".jpg", ".jpeg", ".png")
# What a broken pickle is found out by.
BROKEN = (
    UnpicklingError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
)


def miniimagenet(data_dir: str, size: int) -> Source:
    """Find miniImageNet below ``data_dir`` in any of the layouts people have on disk.

    They are, inside ``miniimagenet/``: ``train.csv``, ``val.csv`` and ``test.csv`` (columns filename, label) beside
    a folder ``images/`` or zips; one folder a split with one folder a class; or the pickled caches of three files
    (dictionaries of "image_data" and "class_dict", or of "data" and "labels").

    Args:
        data_dir: holds the folder.
        size: height and width of the images.

    Raises:
        FewShotError: no layout is found, or the one found is incomplete.
    """
    folders = [Path(data_dir).expanduser() / name for name in FOLDERS]
    for folder in folders:
        tables = {split: folder / f"{split}.csv" for split in SPLITS}
        if all(table.exists() for table in tables.values()):
            return _from_tables(folder, tables, size)
        if all((folder / split).is_dir() for split in SPLITS):
            return _from_folders(folder, size)
        pickles = {split: _find_pickle(folder, split) for split in SPLITS}
        if all(pickles.values()):
            return _from_pickles({split: path for split, path in pickles.items() if path}, size)
    raise FewShotError(
        f"miniImageNet is not in {folders[0]}, and its licence allows no automatic download.",
        "Put there: images/ (or zips of it) with train.csv, val.csv, test.csv; or train/, val/, test/ with a folder",
        "a class; or the pickled caches mini-imagenet-cache-{train,val,test}.pkl. Or name its parent: data_dir=PATH",
    )


def _from_tables(folder: Path, tables: Mapping[str, Path], size: int) -> Source:
    zips = sorted(folder.glob("*.zip"))
    unpacked = list_folder(folder / "images")
    files = [*tables.values(), *zips, *(folder / "images" / name for name in unpacked)]

    def classes() -> list[ImageClass]:
        rows = {split: _read_table(table) for split, table in tables.items()}
        listed = Counter(name for of_split in rows.values() for name, _ in of_split)
        repeated = [name for name, count in listed.items() if count > 1]
        if repeated:
            raise FewShotError(
                f"{len(repeated)} images are listed more than once in {', '.join(map(str, tables.values()))}, "
                f"{repeated[0]} for one: what is tested must not have been trained on; correct the tables"
            )
        by_name: dict[str, ImageFile] = {}
        for place, found in [*((archive, list_zip(archive)) for archive in zips), (folder / "images", unpacked)]:
            by_name |= _by_name(place, found, listed)
        classes = []
        for split, of_split in rows.items():
            missing = [name for name, _ in of_split if name not in by_name]
            if missing:
                raise FewShotError(
                    f"{len(missing)} of the {len(of_split)} images that {tables[split]} lists are neither in "
                    f"{folder / 'images'} nor in a zip beside it, {missing[0]} for one: unpack the images again"
                )
            of_class = defaultdict(list)
            for name, label in of_split:
                of_class[label].append(by_name[name])
            classes += [_image_class(label, split, images, size) for label, images in of_class.items()]
        return classes

    return Source(files, classes)


def _by_name(place: Path, found: Mapping[str, ImageFile], listed: Container[str]) -> dict[str, ImageFile]:
    """The files that the tables list, by their bare name, whatever folder of ``place`` they lie in."""
    by_name: dict[str, ImageFile] = {}
    for path, file in found.items():
        name = path.rpartition("/")[2]
        if name in by_name:
            raise FewShotError(
                f"{place} has two files {name}, {by_name[name].name} and {file.name}: the tables cannot tell them "
                "apart; remove one"
            )
        if name in listed:
            by_name[name] = file
    return by_name


def _read_table(table: Path) -> list[tuple[str, str]]:
    try:
        text = read_file(table).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [(row["filename"], row["label"]) for row in reader]
    except KeyError as error:
        raise FewShotError(f"{table} has no column {error}: it needs filename and label, with commas") from error
    except UnicodeDecodeError as error:
        raise FewShotError(f"{table} is not text in UTF-8, at byte {error.start}: save it as such") from error
    except (OSError, csv.Error) as error:
        raise FewShotError(f"{table} is not a table with the columns filename and label: {error}") from error
    if not rows or not all(name and label for name, label in rows):
        raise FewShotError(f"{table} has no rows, or rows without a filename or a label; fetch it again")
    return rows


def _from_folders(folder: Path, size: int) -> Source:
    listed = {split: list_folder(folder / split) for split in SPLITS}

    def classes() -> list[ImageClass]:
        found = []
        for split, files in listed.items():
            of_class = defaultdict(list)
            for name, file in files.items():
                if name.lower().endswith(IMAGES) and "/" in name:
                    of_class[name.split("/")[0]].append(file)
            if not of_class:
                raise FewShotError(f"{folder / split} holds no folder with images: one folder a class is expected")
            found += [_image_class(name, split, images, size) for name, images in of_class.items()]
        return found

    return Source([folder / split / name for split, files in listed.items() for name in files], classes)


def _image_class(name: str, split: str, files: Sequence[ImageFile], size: int) -> ImageClass:
    def load() -> NDArray[np.uint8]:
        return np.stack([decode(file, size, channels=3) for file in files])

    return ImageClass(name, split, len(files), load)


def _find_pickle(folder: Path, split: str) -> Path | None:
    # MetaOptNet's caches hold the training classes once more as train_phase_val and train_phase_test.
    names = (
        f"*cache*{split}.pkl",
        f"*category_split_{'train_phase_train' if split == 'train' else split}.pickle",
    )
    return next((path for name in names for path in sorted(folder.glob(name))), None)


def _from_pickles(pickles: Mapping[str, Path], size: int) -> Source:
    def classes() -> list[ImageClass]:
        found = []
        for split, path in pickles.items():
            images, of_class = _read_pickle(path)
            for label, members in of_class.items():
                name = label if isinstance(label, str) else f"{split}/{label}"
                load = partial(_resized, images, members, size)
                found.append(ImageClass(name, split, len(members), load))
        return found

    return Source(list(pickles.values()), classes)


def _resized(images: NDArray[np.uint8], members: Sequence[int], size: int) -> NDArray[np.uint8]:
    return np.stack([to_pixels(Image.fromarray(images[member]), size, channels=3) for member in members])


def _read_pickle(path: Path) -> tuple[NDArray[np.uint8], Mapping[Any, list[int]]]:
    """The images of one pickled cache, uint8 ``[images, height, width, 3]``, and the members of each class."""
    try:
        with plain(path).open("rb") as file:
            cache = unpickle(file)
        if not isinstance(cache, dict):
            raise TypeError("it holds no dictionary")
        images = to_array(cache["image_data" if "image_data" in cache else "data"])
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(f"its images are {images.dtype} {list(images.shape)}, not uint8 [images, h, w, 3]")
        of_class: dict[Any, list[int]] = defaultdict(list)
        if "image_data" in cache:
            of_class |= {label: to_list(members, len(images)) for label, members in cache["class_dict"].items()}
        else:
            for member, label in zip(range(len(images)), to_list(cache["labels"], len(images)), strict=True):
                if not isinstance(label, int | str):
                    raise TypeError("its labels are not whole numbers or text")
                of_class[label].append(member)
            of_class = dict(sorted(of_class.items()))
        if not all(of_class.values()):
            raise ValueError("a class has no images")
        if not all(isinstance(member, int) for members in of_class.values() for member in members):
            raise TypeError("the images of a class are not a list of whole numbers")
        if not all(0 <= member < len(images) for members in of_class.values() for member in members):
            raise ValueError("a class names images that it does not hold")
    except BROKEN as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise FewShotError(f"{path} is not a pickled miniImageNet cache: {reason}; fetch it again") from error
    return images, of_class
