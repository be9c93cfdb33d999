"""miniImageNet (Vinyals et al., 2016) in the split of Ravi & Larochelle (2017): 64 + 16 + 20 classes."""

import csv
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewshot.data.bank import SPLITS, ImageClass, Source
from fewshot.data.files import ImageFile, list_folder, list_zip
from fewshot.data.images import decode, to_pixels
from fewshot.errors import FewShotError

FOLDERS = ("miniimagenet", "mini-imagenet", "mini_imagenet", "miniImageNet")  # under data_dir
IMAGES = (".jpg", ".jpeg", ".png")


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
        f"miniImageNet is not in {folders[0]}, and its licence allows no automatic download.\n"
        "Put there: images/ (or zips of it) with train.csv, val.csv, test.csv; or train/, val/, test/ with a folder\n"
        "a class; or the pickled caches mini-imagenet-cache-{train,val,test}.pkl. Or name its parent: data_dir=PATH"
    )


def _from_tables(folder: Path, tables: Mapping[str, Path], size: int) -> Source:
    zips = sorted(folder.glob("*.zip"))
    unpacked = list_folder(folder / "images")
    files = [*tables.values(), *zips, *(Path(file.name) for file in unpacked.values())]

    def classes() -> list[ImageClass]:
        by_name = {Path(name).name: file for archive in zips for name, file in list_zip(archive).items()}
        by_name |= {Path(name).name: file for name, file in unpacked.items()}
        listed = []
        for split, table in tables.items():
            rows = _read_table(table)
            missing = [name for name, _ in rows if name not in by_name]
            if missing:
                raise FewShotError(
                    f"{len(missing)} of the {len(rows)} images that {table} lists are neither in {folder / 'images'} "
                    f"nor in a zip beside it, {missing[0]} for one: unpack the images again"
                )
            of_class = defaultdict(list)
            for name, label in rows:
                of_class[label].append(by_name[name])
            listed += [_image_class(label, split, images, size) for label, images in of_class.items()]
        return listed

    return Source(files, classes)


def _read_table(table: Path) -> list[tuple[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [(row["filename"], row["label"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
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

    return Source([Path(file.name) for files in listed.values() for file in files.values()], classes)


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


def _resized(images: NDArray[np.uint8], members: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    return np.stack([to_pixels(Image.fromarray(images[member]), size, channels=3) for member in members])


def _read_pickle(path: Path) -> tuple[NDArray[np.uint8], Mapping[Any, NDArray[np.int64]]]:
    """The images of one pickled cache, uint8 ``[images, height, width, 3]``, and the members of each class."""
    try:
        with path.open("rb") as file:
            cache = _ArraysOnly(file, encoding="latin1").load()
        if "image_data" in cache:
            images, of_class = cache["image_data"], cache["class_dict"]
        else:
            labels = np.asarray(cache["labels"])
            images = np.asarray(cache["data"])
            if labels.shape != (len(images),):
                raise ValueError(f"it has {len(images)} images and labels {list(labels.shape)}")
            of_class = {label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"its images are {images.dtype} {list(images.shape)}, not uint8 [images, h, w, 3]")
        of_class = {label: np.asarray(members) for label, members in of_class.items()}
        if any(members.ndim != 1 or members.dtype.kind not in "iu" for members in of_class.values()):
            raise ValueError("the images of a class are not a list of whole numbers")
        if any(members.min() < 0 or members.max() >= len(images) for members in of_class.values()):
            raise ValueError("a class names images that it does not hold")
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        OverflowError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise FewShotError(f"{path} is not a pickled miniImageNet cache: {error}; fetch it again") from error
    return images, of_class


class _Dtype:
    """What numpy.dtype is read as: numbers and strings only, and nothing of it can be changed afterwards.

    numpy's own takes its flags from the pickle, which can pass bytes off as pointers to objects.
    """

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch(r"[biufSU]\d+", name):
            raise pickle.UnpicklingError(f"it has an array of {name}, which are no numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Sequence[Any]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What numpy.ndarray is read as; ``numpy.asarray`` makes an array of it."""

    def __init__(self, *_: object) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, fortran, contents = state
        self.array = _from_bytes(contents, dtype, shape, "F" if fortran else "C")

    def __array__(self, *_: object, **__: object) -> NDArray[Any]:
        return self.array


def _from_bytes(contents: bytes | str, dtype: _Dtype, shape: Sequence[int], order: Literal["C", "F"]) -> NDArray[Any]:
    raw = contents.encode("latin1") if isinstance(contents, str) else contents  # Python 2 had one type for both
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: _Dtype, contents: bytes | str) -> Any:
    return _from_bytes(contents, dtype, (1,), "C")[0]


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and plain containers; a pickle that names anything else, code say, is refused."""

    ADMITTED: Mapping[tuple[str, str], Any] = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
        **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _from_bytes for core in ("core", "_core")},
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "list"): list,
        ("builtins", "range"): range,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.ADMITTED[module, name]
