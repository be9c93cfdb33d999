"""Data sets as they lie on people's disks, small and synthetic: what the tests read, and a table of what is read.

    PYTHONPATH=src python tests/layouts.py

prints a line for each layout, with what the program on the path says of it.
"""

import csv
import io
import json
import pickle
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewshot.data.bank import SPLITS, Source

Files = Mapping[str, bytes]  # by path below data_dir


@dataclass(frozen=True)
class Layout:
    """Files below a folder, and what is to come of them.

    Attributes:
        name: says what is special.
        files: what they hold, by path.
        data_dir: what is given as ``data_dir``, in that folder.
        message: what the error says; None: the data set is read.
        links: pairs of the path of a link and where it leads.
    """

    name: str
    files: Files
    data_dir: str = ""
    message: str | None = None
    links: tuple[tuple[str, str], ...] = ()

    def write(self, root: Path) -> Path:
        """Write it below a folder; returns what to give as ``data_dir``."""
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
        lines = [columns, *(row(number, *of) for number, of in enumerate(rows(split)))]
        csv.writer(text, delimiter=delimiter).writerows(line for line in lines if line)
        found[path.format(split=(names or {}).get(split, split))] = text.getvalue().encode()
    return found


def classes(path: str = "{split}/{label}/{name}", splits: Mapping[str, str] | None = None, **options: Any) -> Files:
    """A folder a split with a folder a class."""
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
    from fewshot.data.miniimagenet import SPLIT_OF_CLASS  # noqa: PLC0415

    return {path.format(label=label): encoded(pixels(label, 0), "JPEG") for label in SPLIT_OF_CLASS}


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
        message=r"miniimagenet has test, train, but no folder for val: put val/ beside them",
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
        message=r"has several folders for val: val, validation; keep one there",
    ),
    Layout(
        "something else in the folder",
        below("miniimagenet", {"notes/README.md": b"hello"}),
        message=r"miniImageNet is not what lies in .*miniimagenet, .*miniimagenet holds notes/",
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


def read_miniimagenet(data_dir: Path) -> Source:
    from fewshot.data.miniimagenet import miniimagenet  # noqa: PLC0415

    return miniimagenet(str(data_dir), SIDE)


READERS: dict[str, tuple[list[Layout], Callable[[Path], Source]]] = {
    "miniImageNet": (MINIIMAGENET, read_miniimagenet),
}


def outcome(layout: Layout, read: Callable[[Path], Source]) -> str:
    """What comes of a layout, in a line."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        data_dir = layout.write(Path(folder))
        try:
            counts = [0, 0, 0]
            for image_class in read(data_dir).classes():
                image_class.load()
                counts[SPLITS.index(image_class.split)] += 1
        except Exception as error:
            return " ".join(f"{type(error).__name__}: {error}".replace(folder, "").split())
        return "read: {} / {} / {} classes".format(*counts)


def main() -> None:
    """Print the table."""
    for name, (layouts, read) in READERS.items():
        for layout in layouts:
            sys.stdout.write(f"{name}\t{layout.name}\t{outcome(layout, read)}\n")


if __name__ == "__main__":
    main()
