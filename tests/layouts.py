"""Small synthetic data sets in the layouts that people have on their disks.

The tests read them, and

    PYTHONPATH=src python tests/layouts.py

prints a line for each layout, with the outcome in the version on the path; see ``tried.py``.
"""

import csv
import io
import json
import pickle
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw

from fewshot.data.bank import SPLITS, Source

Files = dict[str, bytes]  # by path below data_dir


@dataclass(frozen=True)
class Layout:
    """Files below a folder, and the expected outcome.

    Attributes:
        name: says what is special.
        files: their contents, by path.
        data_dir: the ``data_dir`` to use, relative to that folder.
        message: a regular expression for the error; None: the data set is read.
        links: pairs of a link's path and its target.
        counts: for dataset=folder, the classes of each split.
        depth: ``dataset.source.depth``.
    """

    name: str
    files: Files
    data_dir: str = ""
    message: str | None = None
    links: tuple[tuple[str, str], ...] = ()
    counts: tuple[int, ...] = ()
    depth: int = 1

    def write(self, root: Path) -> Path:
        """Write it below a folder; returns the ``data_dir`` to use."""
        root.mkdir(parents=True, exist_ok=True)
        for path, contents in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(contents)
        for path, target in self.links:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).symlink_to(target)
        return root / self.data_dir


def below(folder: str, *many: Files) -> Files:
    """The same files, in a folder."""
    return {f"{folder}/{path}" if folder else path: contents for files in many for path, contents in files.items()}


def zipped(*many: Files) -> bytes:
    """A zip of files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, contents in below("", *many).items():
            archive.writestr(path, contents)
    return buffer.getvalue()


def tarred(*many: Files, mode: Any = "w") -> bytes:
    """A tar of files and their folders, as ``tar`` makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        files = below("", *many)
        for folder in sorted({path.rpartition("/")[0] for path in files} - {""}):
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            archive.addfile(entry)
        for path, contents in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(contents)
            archive.addfile(entry, io.BytesIO(contents))
    return buffer.getvalue()


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 98} if kind == "JPEG" else {}))
    return buffer.getvalue()


# miniImageNet

MINI = {
    "train": ("n01532829", "n01558993", "n01704323"),
    "val": ("n01855672", "n02091244"),
    "test": ("n01930112", "n01981276"),
}
COUNT = 2  # images of each class
SIDE = 12  # pixels


@cache
def pixels(label: str, number: int) -> np.ndarray:
    """Smooth, so that JPEG keeps it nearly as it is."""
    ramp = np.linspace(0, 60 + 60 * number, SIDE * SIDE).reshape(SIDE, SIDE, 1)
    return (ramp + np.array([int(label[-2:]), int(label[-4:-2]), int(label[-6:-4])])).astype(np.uint8)


def rows(split: str, kind: str = "jpg") -> list[tuple[str, str]]:
    return [(f"{label}{number:08}.{kind}", label) for label in MINI[split] for number in range(COUNT)]


def photos(splits: Iterable[str] = SPLITS, kind: str = "jpg", path: str = "{name}") -> Files:
    """The images of some splits, as JPEG or PNG; ``path`` says where each lies."""
    return {
        path.format(name=name, label=label, split=split, number=name[9:]): encoded(
            pixels(label, int(name[9:17])), {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG"}[kind]
        )
        for split in splits
        for name, label in rows(split, kind)
    }


def tables(
    path: str = "{split}.csv",
    columns: tuple[str, ...] = ("filename", "label"),
    delimiter: str = ",",
    names: Mapping[str, str] | None = None,
    row: Callable[[int, str, str], tuple[Any, ...]] = lambda _, name, label: (name, label),
    splits: Iterable[str] = SPLITS,
) -> Files:
    """The tables of some splits."""
    found = {}
    for split in splits:
        text = io.StringIO()
        lines = [columns, *(row(number, *entry) for number, entry in enumerate(rows(split)))]
        csv.writer(text, delimiter=delimiter).writerows(line for line in lines if line)
        found[path.format(split=(names or {}).get(split, split))] = text.getvalue().encode()
    return found


def classes(path: str = "{split}/{label}/{name}", splits: Mapping[str, str] | None = None, **options: Any) -> Files:
    """One folder per split with one folder per class."""
    return {
        found: contents
        for split in SPLITS
        for found, contents in photos(
            [split], path=path.replace("{split}", (splits or {}).get(split, split)), **options
        ).items()
    }


def caches(path: str = "mini-imagenet-cache-{split}.pkl", names: Mapping[str, str] | None = None) -> Files:
    """The pickled caches."""
    return {
        path.format(split=(names or {}).get(split, split)): pickle.dumps(
            {
                "image_data": np.stack([pixels(label, number) for label in MINI[split] for number in range(COUNT)]),
                "class_dict": {
                    label: list(range(COUNT * place, COUNT * (place + 1))) for place, label in enumerate(MINI[split])
                },
            },
            2,
        )
        for split in SPLITS
    }


def hdf5(data: str = "{split}_data.hdf5", labels: str = "{split}_labels.json") -> Files:
    """An HDF5 file a split with a dataset a class, and their names in JSON."""
    import h5py  # noqa: PLC0415

    found = {}
    for split in SPLITS:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            for label in MINI[split]:
                file[f"datasets/{label}"] = np.stack([pixels(label, number) for number in range(COUNT)])
        found[data.format(split=split)] = buffer.getvalue()
        found[labels.format(split=split)] = json.dumps(MINI[split]).encode()
    return found


def published(path: str = "{label}/{label}_0.JPEG") -> Files:
    """An image of each of the 100 classes, in no splits."""
    # From this checkout, whichever version is on the path.
    text = (Path(__file__).parents[1] / "src" / "fewshot" / "data" / "miniimagenet.py").read_text()
    return {path.format(label=label): encoded(pixels(label, 0), "JPEG") for label in re.findall(r"\bn\d{8}\b", text)}


def split_archives(kind: str, pack: Callable[..., bytes], splits: Iterable[str] = SPLITS) -> Files:
    """An archive for each split, with a folder for each class."""
    return {f"{split}{kind}": pack(photos([split], path="{split}/{label}/{name}")) for split in splits}


VALIDATION = {"val": "validation"}
TITLES = {"train": "Train", "val": "Val", "test": "Test"}
LONG = {"train": "training", "val": "validation", "test": "testing"}

MINIIMAGENET = [
    # Names of the folder.
    *(
        Layout(f"folder {name}/", below(name, tables(), below("images", photos())))
        for name in ("miniImageNet--ravi", "mini-imagenet-84x84", "Mini ImageNet", "MINIIMAGENET", "miniImagenet_data")
    ),
    Layout(
        "folder of another name, given as data_dir",
        below("ravi", tables(), below("images", photos())),
        "ravi",
    ),
    Layout("folder of another name, below data_dir", below("ravi", tables(), below("images", photos()))),
    Layout("beside each other in data_dir", {**tables(), **below("images", photos())}),
    Layout(
        "the folder itself as data_dir",
        below("miniimagenet", tables(), below("images", photos())),
        "miniimagenet",
    ),
    Layout("folder in a folder of its name", below("miniimagenet/miniimagenet", classes())),
    # Tables.
    *(
        Layout(
            f"tables in {folder}/",
            below("miniimagenet", tables(folder + "/{split}.csv"), below("images", photos())),
        )
        for folder in ("split", "splits", "csv", "labels")
    ),
    *(
        Layout(
            f"header {','.join(columns)}",
            below("miniimagenet", tables(columns=columns), below("images", photos())),
        )
        for columns in (
            *(("image", "class"), ("image_name", "class_name"), ("Filename", "Label"), (" filename ", " label ")),
            *(("IMAGE_NAME", "CLASS"), ("file name", "wnid"), ("img_path", "category")),
        )
    ),
    *(
        Layout(
            f"separated by {name}",
            below("miniimagenet", tables(delimiter=mark), below("images", photos())),
        )
        for name, mark in (("semicolons", ";"), ("tabs", "\t"))
    ),
    Layout(
        "spaces after commas",
        below("miniimagenet", tables(row=lambda _, name, label: (f" {name}", f" {label} ")), below("images", photos())),
    ),
    Layout(
        "a column of numbers first",
        below(
            "miniimagenet",
            tables(columns=("", "filename", "label"), row=lambda number, name, label: (number, name, label)),
            below("images", photos()),
        ),
    ),
    Layout("tables without a header", below("miniimagenet", tables(columns=()), below("images", photos()))),
    Layout("tables .tsv", below("miniimagenet", tables("{split}.tsv", delimiter="\t"), below("i", photos()))),
    Layout(
        "tables validation.csv and Train.csv",
        below("miniimagenet", tables(names={"train": "Train", **VALIDATION}), below("images", photos())),
    ),
    Layout(
        "tables with paths of images",
        below(
            "miniimagenet",
            tables(row=lambda _, name, label: (f"images/{label}/{name}", label)),
            below("images", photos(path="{label}/{name}")),
        ),
    ),
    Layout(
        "names that repeat from class to class",
        below(
            "miniimagenet",
            tables(row=lambda _, name, label: (name[9:], label)),
            below("images", photos(path="{label}/{number}")),
        ),
    ),
    Layout("PNG where tables say .jpg", below("miniimagenet", tables(), below("images", photos(kind="png")))),
    Layout("images in img/", below("miniimagenet", tables(), below("img", photos()))),
    Layout("images beside the tables", below("miniimagenet", tables(), photos())),
    Layout(
        "images in a folder for each split",
        below("miniimagenet", tables(), photos(path="{split}/{name}")),
    ),
    # Folders.
    *(
        Layout(
            f"folders {', '.join(names.get(s, s) for s in SPLITS)}",
            below("miniimagenet", classes(splits=names)),
        )
        for names in (VALIDATION, {"val": "valid"}, TITLES, LONG, {"train": "base", "test": "novel"})
    ),
    Layout("folders of splits in images/", below("miniimagenet/images", classes())),
    Layout("folders of splits in data_dir", classes()),
    Layout(
        "folders of splits of bare images",
        below("miniimagenet", photos(path="{split}/{label}_{number}")),
    ),
    Layout("folders of splits in PNG", below("miniimagenet", classes(kind="png"))),
    # Archives.
    *(
        Layout(
            f"{kind} for each split",
            below(
                "miniimagenet",
                {f"{split}{kind}": pack(photos([split], path="{split}/{label}/{name}")) for split in SPLITS},
            ),
        )
        for kind, pack in (
            (".tar", tarred),
            (".tar.gz", lambda *files: tarred(*files, mode="w:gz")),
            (".tgz", lambda *files: tarred(*files, mode="w:gz")),
            (".zip", zipped),
        )
    ),
    Layout(
        "tars of each split without its name inside, in data_dir",
        {
            f"mini-imagenet-{split}.tar": tarred(photos([split], path="{label}/{name}"))
            for split in ("train", "val", "test")
        },
    ),
    Layout(
        "tables beside images.tar.gz",
        below("miniimagenet", tables(), {"images.tar.gz": tarred(below("./images", photos()), mode="w:gz")}),
    ),
    *(
        Layout(
            f"one {kind} of everything, tables inside",
            {f"mini-imagenet{kind}": pack(below("mini-imagenet", tables(), below("images", photos())))},
        )
        for kind, pack in ((".zip", zipped), (".tar.gz", lambda *files: tarred(*files, mode="w:gz")))
    ),
    Layout(
        "one zip of everything, given as data_dir",
        {"mini.zip": zipped(below("mini-imagenet", tables(), below("images", photos())))},
        "mini.zip",
    ),
    Layout("one zip of folders of splits", below("miniimagenet", {"archive.zip": zipped(classes())})),
    Layout(
        "unpacked images beside the tar they came in",
        below("miniimagenet", tables(), below("images", photos()), {"images.tar": tarred(photos())}),
    ),
    # Caches.
    Layout(
        "caches with validation in the name",
        below("miniimagenet", caches("mini-imagenet-cache-{split}.pickle", VALIDATION)),
    ),
    Layout("caches in data_dir", caches()),
    Layout("caches validation in data_dir", caches(names=VALIDATION)),
    Layout("caches train.pkl, val.pkl, test.pkl", below("miniimagenet", caches("{split}.pkl"))),
    Layout("caches in a tar.gz", {"mini-imagenet.tar.gz": tarred(caches(), mode="w:gz")}),
    Layout("caches in a zip", below("miniimagenet", {"caches.zip": zipped(caches())})),
    Layout("HDF5 with JSON", below("miniimagenet", hdf5())),
    Layout("HDF5 with JSON in data_dir", hdf5()),
    Layout("HDF5 in a zip", below("miniimagenet", {"all.zip": zipped(hdf5())})),
    Layout("the 100 classes without splits", below("miniimagenet", published())),
    Layout("the 100 classes without splits, zipped", {"miniimagenet.zip": zipped(published())}),
    Layout(
        "linked images",
        {**below("miniimagenet", tables()), **below("elsewhere", photos())},
        links=(("miniimagenet/images", "../elsewhere"),),
    ),
    Layout(
        "linked folder",
        below("elsewhere/x", classes()),
        "data",
        links=(("data/miniimagenet", "../elsewhere/x"),),
    ),
    # Found, and not whole.
    Layout(
        "no table for test",
        below("miniimagenet", tables(splits=("train", "val")), below("images", photos())),
        message=r"miniimagenet has train\.csv, val\.csv, but no table for test: add .*miniimagenet/test\.csv",
    ),
    Layout(
        "no folder for val",
        below("miniimagenet", photos(["train", "test"], path="{split}/{label}/{name}")),
        message=r"miniimagenet has test, train, but no folder for val: add val/",
    ),
    Layout(
        "no cache for validation",
        {n: c for n, c in below("miniimagenet", caches()).items() if "val" not in n},
        message=r"but no cache for val: add .*mini-imagenet-cache-val\.pkl",
    ),
    Layout(
        "no tar for test",
        below("miniimagenet", {f"{s}.tar": tarred(photos([s], path="{label}/{name}")) for s in ("train", "val")}),
        message=r"miniimagenet has train\.tar, val\.tar, but no folder for test",
    ),
    Layout(
        "tables without images",
        below("miniimagenet", tables()),
        message=r"6 of the 6 images that .*train\.csv lists are neither in .*: unpack the images again",
    ),
    Layout(
        "images without tables",
        below("miniimagenet", below("images", photos())),
        message=r"has images of 7 of the 100 classes; .* missing, .* put train\.csv, val\.csv and test\.csv there",
    ),
    Layout(
        "both val/ and validation/",
        below("miniimagenet", classes(), classes(splits=VALIDATION)),
        message=r"has several folders for val: val, validation; keep one of them",
    ),
    Layout(
        "something else in the folder",
        below("miniimagenet", {"notes/README.md": b"hello"}),
        message=r"miniImageNet was not recognised in .*miniimagenet, .*miniimagenet holds notes/",
    ),
    Layout("an empty data_dir", {}, message=r"miniImageNet is not in .* holds nothing"),
    # Other data are not taken for it.
    Layout(
        "other classes below data_dir",
        below("birds", {p.replace("n0", "b0"): c for p, c in classes().items()}),
        message="miniImageNet is not in",
    ),
    Layout(
        "other classes of ImageNet below data_dir",
        below("imagenet", {p.replace("n01", "n03").replace("n02", "n04"): c for p, c in classes().items()}),
        message="miniImageNet is not in",
    ),
]


# Omniglot: two alphabets of each part, three drawings of each character

ALPHABETS = {
    "images_background": {"Greek": 3, "Japanese_(hiragana)": 3},
    "images_evaluation": {"Tibetan": 2, "ULOG": 2},
}
DRAWERS = 3


@cache
def drawing(number: int, drawer: int, side: int = 105) -> bytes:
    image = Image.new("1", (side, side), 1)
    ImageDraw.Draw(image).line([(20, 20 + 5 * number), (85, 60 + drawer)], fill=0, width=4)
    return encoded(np.asarray(image), "PNG")


def drawings(
    part: str,
    path: str = "{part}/{alphabet}/{character}/{name}.png",
    only: tuple[str, ...] = (),
    drawers: int = DRAWERS,
) -> Files:
    """The drawings of a part; ``path`` says where each is, ``only`` of which alphabets."""
    return {
        path.format(
            part=part,
            alphabet=alphabet,
            character=f"character{number:02}",
            name=f"{10 * len(alphabet) + number:04}_{drawer}",
        ): drawing(len(alphabet) + number, drawer)
        for alphabet, count in ALPHABETS[part].items()
        for number in range(1, count + 1)
        for drawer in range(1, drawers + 1)
        if alphabet in only or not only
    }


BACKGROUND, EVALUATION = ALPHABETS


def both(path: str = "{part}/{alphabet}/{character}/{name}.png") -> Files:
    return {**drawings(BACKGROUND, path), **drawings(EVALUATION, path)}


def part_archives(path: str = "{part}.zip", pack: Callable[..., bytes] = zipped, inner: str = "") -> Files:
    """An archive for each part."""
    return {path.format(part=part): pack(below(inner, drawings(part))) for part in ALPHABETS}


MERGED = "{alphabet}/{character}/{name}.png"
LAKE = {  # what else Lake's repository contains
    "README.md": b"hello",
    "python/strokes_background.zip": zipped({"strokes_background/Greek/character01/0001_1.txt": b"1,2,3"}),
    "python/images_background_small1.zip": zipped(
        drawings(BACKGROUND, "images_background_small1/{alphabet}/{character}/{name}.png", ("Greek",))
    ),
    "python/one-shot-classification/all_runs.zip": zipped({"run01/training/class01.png": drawing(1, 1)}),
    "matlab/data_background.mat": b"MATLAB",
}

OMNIGLOT = [
    Layout("zips in omniglot/", below("omniglot", part_archives())),
    Layout("folders in omniglot/", below("omniglot", both())),
    *(
        Layout(f"folders in {name}/", below(name, both()))
        for name in ("omniglot-py", "Omniglot", "OMNIGLOT", "omniglot_dataset", "Omniglot Data Set")
    ),
    Layout("folders in omniglot/images/", below("omniglot/images", both())),
    Layout("Lake's repository", below("omniglot-master", LAKE, below("python", part_archives()))),
    Layout("Lake's repository, in omniglot/", below("omniglot", LAKE, below("python", part_archives()))),
    Layout("Lake's repository, unpacked", below("omniglot", LAKE, below("python", both()))),
    Layout("Lake's repository, as data_dir", below("omniglot", LAKE, below("python", part_archives())), "omniglot"),
    Layout("Lake's repository under another name, as data_dir", below("lake", LAKE, below("python", both())), "lake"),
    Layout("its python/ as data_dir", below("omniglot/python", part_archives()), "omniglot/python"),
    Layout("the folder itself as data_dir", below("omniglot", both()), "omniglot"),
    Layout("a folder of another name as data_dir", below("characters", both()), "characters"),
    Layout("a folder of another name below data_dir", below("characters", both())),
    Layout("zips in data_dir", part_archives()),
    Layout("folders in data_dir", both()),
    Layout("one part in a folder, one in a zip", below("omniglot", drawings(BACKGROUND), part_archives())),
    Layout(
        "parts in different folders",
        {**below("omniglot", drawings(BACKGROUND)), **below("omniglot-py", drawings(EVALUATION))},
    ),
    Layout("zips that contain a folder more", below("omniglot", part_archives(inner="omniglot"))),
    Layout("folders twice, as some programs unpack", below("omniglot", both("{part}/{part}/" + MERGED))),
    Layout(
        "zips without the part's folder",
        below("omniglot", {f"{part}.zip": zipped(drawings(part, MERGED)) for part in ALPHABETS}),
    ),
    *(
        Layout(f"{kind} of each part", below("omniglot", part_archives("{part}" + kind, pack)))
        for kind, pack in ((".tar", tarred), (".tar.gz", lambda *files: tarred(*files, mode="w:gz")))
    ),
    Layout("one zip of everything", {"omniglot.zip": zipped(below("omniglot", both()))}),
    Layout("one zip of everything, as data_dir", {"all.zip": zipped(both())}, "all.zip"),
    Layout("merged", below("omniglot", both(MERGED))),
    Layout("merged, in omniglot/data/", below("omniglot/data", both(MERGED))),
    Layout("merged, in omniglot_resized/", below("omniglot_resized", both(MERGED))),
    Layout("merged, as data_dir", below("all", both(MERGED)), "all"),
    Layout("merged, zipped", below("omniglot", {"images.zip": zipped(both(MERGED))})),
    Layout(
        "an alphabet divided over train/ and test/",
        {
            f"omniglot/{'train' if 'character01' in path else 'test'}/{path}": contents
            for path, contents in both(MERGED).items()
        },
    ),
    Layout(
        "alphabets without brackets, in small letters",
        below("omniglot", {p.replace("(", "").replace(")", "").lower(): c for p, c in both().items()}),
    ),
    Layout("names in capitals", below("omniglot", {p.replace(".png", ".PNG"): c for p, c in both().items()})),
    Layout(
        "linked alphabets",
        {**below("elsewhere", both(MERGED))},
        "data",
        links=tuple(
            (f"data/omniglot/{part}/{alphabet}", f"../../../elsewhere/{alphabet}")
            for part, alphabets in ALPHABETS.items()
            for alphabet in alphabets
        ),
    ),
    Layout("a linked folder", below("elsewhere", both()), "data", links=(("data/omniglot", "../elsewhere"),)),
    Layout(
        "the smaller background sets too",
        below("omniglot", both(), drawings(BACKGROUND, "images_background_small1/" + MERGED, ("Greek",))),
    ),
    Layout("unpacked beside the zips", below("omniglot", both(), part_archives())),
    Layout(
        "half unpacked beside the zips",
        below("omniglot", drawings(BACKGROUND, only=("Greek",)), part_archives()),
    ),
    Layout(
        "an alphabet of your own",
        below("omniglot", both(), drawings(BACKGROUND, "images_background/Mine/{character}/{name}.png", ("Greek",))),
    ),
    # Found, but incomplete.
    Layout(
        "a zip with zips",
        {"omniglot-master.zip": zipped(below("omniglot-master/python", part_archives()))},
        message=r"omniglot-master\.zip contains archives, such as .*python/images_background\.zip: unpack it",
    ),
    Layout(
        "only the background set",
        below("omniglot", drawings(BACKGROUND)),
        message=r"omniglot contains images_background/, but not images_evaluation, which cannot be downloaded",
    ),
    Layout(
        "the background set as data_dir",
        below("omniglot", both()),
        "omniglot/images_background",
        message=r"is half of Omniglot, and images_evaluation is next to it: choose data_dir=.*/omniglot$",
    ),
    Layout(
        "an alphabet is missing",
        below("omniglot", drawings(BACKGROUND, only=("Greek",)), drawings(EVALUATION)),
        message=r"has 3 of the 6 characters of images_background: 0 of 3 of Japanese.*unpack it again",
    ),
    Layout(
        "drawings are missing",
        below("omniglot", drawings(BACKGROUND, drawers=2), drawings(EVALUATION)),
        message=r"images_background has 2 of 3 drawings of Greek/character01, .*; unpack it again",
    ),
    Layout("an empty folder", {"omniglot/.keep": b""}, message=r"Omniglot is not in .*omniglot and cannot be"),
    Layout("an empty data_dir", {}, message=r"Omniglot is not in .*omniglot and cannot be downloaded"),
    Layout(
        "something else in the folder",
        below("omniglot", {"data_background.mat": b"MATLAB"}),
        message=r"omniglot contains data_background\.mat, but not images_background, which cannot be downloaded",
    ),
    Layout("other images below data_dir", below("birds", classes()), message="Omniglot is not in"),
]


# Your own images: dataset=folder


@cache
def own_image(number: int) -> bytes:
    image = np.full((20, 24, 3), number % 5, dtype=np.uint8)
    image[number % 20] = 255
    return encoded(image, "PNG")


def own(names: Iterable[str], path: str = "{name}/{number}.png", images: int = 2) -> Files:
    """A few images of some classes; ``path`` says where each is."""
    return {
        path.format(name=name, number=number): own_image(7 * sum(map(ord, name)) + number)
        for name in names
        for number in range(images)
    }


def own_splits(
    train: str = "train", val: str | None = "val", test: str = "test", path: str = "{name}/{number}.png"
) -> Files:
    """Folders for splits: 10 classes to train, 3 to validate, 4 to test."""
    folders = {train: "abcdefghij", val: "klm", test: "nopq"}
    return {
        name: file for split, names in folders.items() if split for name, file in below(split, own(names, path)).items()
    }


TEN = [f"class {number}" for number in range(10)]
CUB = {
    "README": b"hello",
    "images.txt": b"1 a.jpg",
    "attributes/certainties.txt": b"1",
    "parts/parts.txt": b"1",
}
DIVIDED = (6, 2, 2)  # what ten classes are divided into
CUT = (8, 2, 4)  # after 2 of the 10 training classes have been held out

FOLDER = [
    Layout("one folder per class", own(TEN), counts=DIVIDED),
    *(
        Layout(f"splits {train}, {val}, {test}", own_splits(train, val, test), counts=(10, 3, 4))
        for train, val, test in (
            *(("train", "val", "test"), ("training", "validation", "testing"), ("Train", "Valid", "Test")),
            *(("TRAIN", "DEV", "TEST"), ("base", "val", "novel"), ("Training", "dev", "Testing")),
            *(("meta_train", "meta_val", "meta_test"), ("train_set", "valid_set", "test_set")),
            *(("train-images", "val-images", "test-images"), ("Train Data", "Validation Data", "Test Data")),
            ("base", "validation", "test"),
        )
    ),
    *(
        Layout(f"splits {train}, {test}", own_splits(train, None, test), counts=CUT)
        for train, test in (("train", "test"), ("Training", "Testing"), ("base", "novel"), ("meta-train", "meta-test"))
    ),
    Layout("splits and an empty folder val", own_splits(val=None) | {"val/notes.txt": b"none yet"}, counts=CUT),
    Layout("splits and a folder of notes", own_splits() | {"docs/README.md": b"hello"}, counts=(10, 3, 4)),
    Layout("splits with classes in images/", own_splits(path="images/{name}/{number}.png"), counts=(10, 3, 4)),
    Layout("splits in data/", below("data", own_splits()), counts=(10, 3, 4)),
    Layout("splits in a folder of a folder", below("a/b", own_splits(val=None)), counts=CUT),
    Layout("only train/", below("train", own(TEN)), counts=DIVIDED),
    Layout("CUB: classes in images/", below("", CUB, below("images", own(TEN))), counts=DIVIDED),
    Layout("CUB, the folder above", below("CUB_200_2011", CUB, below("images", own(TEN))), counts=DIVIDED),
    Layout(
        "classes in Images/, as of Stanford Dogs",
        below("Images", own(TEN)) | {"lists/file_list.mat": b""},
        counts=DIVIDED,
    ),
    Layout("classes two folders deep", below("jpg/all", own(TEN)), counts=DIVIDED),
    Layout("images within folders of a class", own(TEN, "{name}/session 1/{number}.png"), counts=DIVIDED),
    Layout(
        "alphabets",
        own(TEN, "alphabet {name}/character 1/{number}.png") | own(TEN, "alphabet {name}/character 2/{number}.png"),
        counts=DIVIDED,
    ),
    Layout(
        "alphabets, two levels deep",
        own(TEN, "alphabet/{name}/{number}.png") | own(TEN, "other/{name}/{number}.png"),
        depth=2,
        counts=(12, 4, 4),
    ),
    Layout(
        "alphabets in splits, two levels deep",
        {
            f"{split}/{alphabet}/{path}": contents
            for split, names in (("train", "abcd"), ("val", "ef"), ("test", "gh"))
            for alphabet in ("first", "second")
            for path, contents in own([f"{split} {name}" for name in names]).items()
        },
        depth=2,
        counts=(8, 4, 4),
    ),
    Layout("images next to the folders", own(TEN) | {"cover.png": own_image(1)}, counts=DIVIDED),
    Layout(
        "other files between",
        own(TEN) | {"class 1/Thumbs.db": b"", "labels.csv": b"a,b", ".DS_Store": b""},
        counts=DIVIDED,
    ),
    Layout("endings in capitals", own(TEN, "{name}/{number}.PNG"), counts=DIVIDED),
    Layout("names in Chinese, with brackets and =", own([f"{name} (鸟) [a=1]" for name in TEN]), counts=DIVIDED),
    Layout("a zip as data_dir", {"birds.zip": zipped(own(TEN))}, "birds.zip", counts=DIVIDED),
    Layout(
        "a tar.gz of CUB as data_dir",
        {"CUB.tgz": tarred(below("CUB", CUB, below("images", own(TEN))), mode="w:gz")},
        "CUB.tgz",
        counts=DIVIDED,
    ),
    Layout(
        "linked classes",
        below("elsewhere", own(TEN)),
        "data",
        links=tuple((f"data/{name}", f"../elsewhere/{name}") for name in TEN),
        counts=DIVIDED,
    ),
    Layout(
        "linked images",
        below("elsewhere", own(TEN)),
        "data",
        links=tuple((f"data/{path}", f"../../elsewhere/{path}") for path in own(TEN)),
        counts=DIVIDED,
    ),
    Layout("a linked data_dir", below("elsewhere", own(TEN)), "data", links=(("data", "elsewhere"),), counts=DIVIDED),
    Layout(
        "linked splits",
        below("elsewhere", own_splits()),
        "data",
        links=tuple((f"data/{split}", f"../elsewhere/{split}") for split in SPLITS),
        counts=(10, 3, 4),
    ),
    Layout("a link to the folder it is in", own(TEN), links=(("class 1/again", "."),), counts=DIVIDED),
    Layout("a link to the folder above", own(TEN), links=(("class 1/up", ".."),), counts=DIVIDED),
    Layout("two links to each other", own(TEN), links=(("class 1/one", "two"), ("class 1/two", "one")), counts=DIVIDED),
    # Found, but incomplete.
    Layout(
        "the same classes in train/ and test/",
        below("train", own(TEN)) | below("test", own(TEN)),
        message=r"train and .*test have 10 classes in common, such as class 0, .*, or draw .*: data_dir=.*/train$",
    ),
    Layout(
        "the same classes in train/ and val/ and test/",
        below("train", own(TEN)) | below("val", own(TEN[:3])) | below("test", own(["x", "y"])),
        message=r"train and .*val have 3 classes in common, such as class 0",
    ),
    Layout(
        "train/ and val/",
        own_splits(test=""),
        message=r"has the folders train, val, .*, but none for test; add .*/test with .*: data_dir=.*/train",
    ),
    Layout(
        "val/ and test/",
        {p: c for p, c in own_splits().items() if "train" not in p},
        message=r"but none for train; add .*/train with",
    ),
    Layout(
        "val/ and validation/",
        own_splits() | below("validation", own("xyz")),
        message=r"several folders for a split, val, validation; merge them, or draw",
    ),
    Layout(
        "test/ without folders",
        below("train", own(TEN)) | {"test/1.png": own_image(1)},
        message=r"test has 0 folders with images.*data_dir=.*/train",
    ),
    Layout(
        "val/ as in Tiny ImageNet",
        below("train", own(TEN, "{name}/images/{number}.png"))
        | {"val/images/1.png": own_image(1), "test/images/1.png": own_image(2)},
        message=r"val has 1 folders with images, .*: data_dir=.*/train",
    ),
    Layout(
        "images in no folder",
        {f"{number}.png": own_image(number) for number in range(9)},
        message=r"has 0 folders with images \(and 9 images outside of these\), too few classes",
    ),
    Layout(
        "only a zip in the folder",
        {"birds.zip": zipped(own(TEN))},
        message=r"there are no images in .*birds\.zip; unpack it, or choose data_dir=.*/birds\.zip",
    ),
    Layout(
        "no images",
        {"README.md": b"hello", "class 1/a.txt": b"a"},
        message=r"there are no images in .* holds README\.md, class 1/; one folder of images per class",
    ),
    Layout("an empty folder", {}, message=r"there are no images in .* holds nothing"),
    Layout("no folder", {}, "none", message=r"there is no folder .*none; choose the folder or archive"),
    Layout("four classes", own(TEN[:4]), message=r"has 4 folders with images, too few classes .*encoder=pretrained"),
    Layout("too deep", own(TEN), depth=2, message=r"has 0 folders with images 2 levels deep \(and 20 images outside"),
]


def read_folder(data_dir: Path, depth: int = 1) -> Source:
    from fewshot.data.folder import folder  # noqa: PLC0415

    return folder(str(data_dir), 16, 3, 0.2, 0.2, 0, **({"depth": depth} if depth != 1 else {}))


@contextmanager
def small_omniglot() -> Iterator[None]:
    """Pretend that Omniglot has 10 characters of 3 drawings, and that there is no network."""
    from torchvision.datasets import Omniglot  # noqa: PLC0415

    from fewshot.data import omniglot as module  # noqa: PLC0415

    with (
        patch.multiple(module, ALPHABETS=ALPHABETS, DRAWERS=DRAWERS, TRAIN_CHARACTERS=7, PAUSES=()),
        patch.object(Omniglot, "download_url_prefix", "http://127.0.0.1:9"),
    ):
        yield


def read_omniglot(data_dir: Path) -> Source:
    from fewshot.data.omniglot import omniglot  # noqa: PLC0415

    with small_omniglot():
        source = omniglot(str(data_dir), 28, "random", 0, 2, rotations=False)
        classes = source.classes()
    return replace(source, classes=lambda: classes)


def read_miniimagenet(data_dir: Path) -> Source:
    from fewshot.data.miniimagenet import miniimagenet  # noqa: PLC0415

    return miniimagenet(str(data_dir), SIDE)


READERS: dict[str, tuple[list[Layout], Callable[..., Source]]] = {
    "miniImageNet": (MINIIMAGENET, read_miniimagenet),
    "Omniglot": (OMNIGLOT, read_omniglot),
    "folder": (FOLDER, read_folder),
}


def outcome(layout: Layout, read: Callable[..., Source]) -> str:
    """Describe the outcome of reading a layout in one line."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        data_dir = layout.write(Path(folder))
        try:
            counts = [0, 0, 0]
            options = {"depth": layout.depth} if layout.depth != 1 else {}
            for image_class in read(data_dir, **options).classes():
                image_class.load()
                counts[SPLITS.index(image_class.split)] += 1
        except Exception as error:
            return " ".join(f"{type(error).__name__}: {error}".replace(folder, "DIR").split())
        return "read: {} / {} / {} classes".format(*counts)


def main() -> None:
    """Print the table."""
    for name, (layouts, read) in READERS.items():
        for layout in layouts:
            sys.stdout.write(f"{name}\t{layout.name}\t{outcome(layout, read)}\n")


if __name__ == "__main__":
    main()
