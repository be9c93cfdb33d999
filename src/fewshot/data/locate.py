"""Find data sets in ``data_dir``: one search for all of them, whose messages list what was found."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewshot.data.files import ImageFile, file_at, is_archive, list_archive, list_folder
from fewshot.errors import FewShotError, shortened

# What people call the splits of a data set. "base" and "novel" are those of Hariharan & Girshick (2017).
# "background" and "evaluation" are those of Omniglot.
ALIASES = {
    "train": ("train", "training", "base", "background"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "novel", "evaluation"),
}
FILLERS = ("meta", "set", "split", "data", "image", "images", "classes")  # as in meta_train and "test images"
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Place:
    """A folder that may contain a data set.

    Attributes:
        path: the folder; ``data_dir`` itself if the files are directly in it.
        named: whether the folder has the name of the data set, or the user chose an archive. In other folders only
            files that identify the data set count.
        files: the files in it by path; archives are not opened.
    """

    path: Path
    named: bool
    files: Mapping[str, ImageFile]

    def archives(self) -> list[str]:
        """Return the paths of the archives in the folder."""
        return [name for name in self.files if is_archive(name)]

    def opened(self) -> dict[str, ImageFile]:
        """Return the files including those in archives; each archive is treated as a folder with its name.

        Raises:
            FewShotError: an archive is broken or unsafe.
        """
        tree = {name: file for name, file in self.files.items() if not is_archive(name)}
        for archive in self.archives():
            tree |= {f"{archive}/{name}": file for name, file in list_archive(self.path / archive).items()}
        return tree


def places(data_dir: Path, name: str, first: tuple[str, ...], belongs: Callable[[Path], bool]) -> Iterator[Place]:
    """Yield the folders that may contain a data set, the most likely first.

    First come the folders in ``data_dir`` with the name of the data set, then ``data_dir`` itself, then its other
    folders. In folders without the name, only files and folders that belong to the data set are considered.

    Args:
        data_dir: where to search.
        name: name of the data set in lower case; folders match if their names contain it.
        first: names of folders to search before the others.
        belongs: whether a folder or an archive without the name may be a part of the data set.

    Raises:
        FewShotError: a folder cannot be listed, or ``data_dir`` is a file that is not an archive.
    """

    def has_its_name(path: str) -> bool:
        return name in plain_name(path)

    if data_dir.is_file():
        if not is_archive(data_dir.name):
            raise FewShotError(f"data_dir={data_dir} is a file; choose the folder that contains it")
        yield Place(data_dir.parent, True, {data_dir.name: file_at(data_dir)})
        return
    folders = sorted(
        children(data_dir), key=lambda child: (first.index(child) if child in first else len(first), child)
    )
    for child in filter(has_its_name, folders):
        yield Place(data_dir / child, True, list_folder(data_dir / child))
    others = [child for child in folders if not has_its_name(child) and not belongs(data_dir / child)]
    for folder in [data_dir, *(data_dir / child for child in others)]:
        if folder == data_dir and has_its_name(folder.name):
            yield Place(folder, True, list_folder(folder))
        else:
            files = list_folder(folder, enter=lambda child: not has_its_name(child) and belongs(folder / child))  # noqa: B023
            kept = {p: f for p, f in files.items() if not is_archive(p) or has_its_name(p) or belongs(folder / p)}
            yield Place(folder, False, kept)


def children(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, including links to folders, without hidden ones."""
    return sorted(name.removesuffix("/") for name in contents(folder) if name.endswith("/"))


def holds(folder: Path) -> str:
    """Describe what a folder contains, for a message."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return f"{folder} holds {shortened(contents(folder)) or 'nothing'}"


def contents(folder: Path) -> list[str]:
    """Return the names of the files and folders in a folder, without hidden ones; those of folders end with a slash.

    Raises:
        FewShotError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FewShotError(f"cannot list the folder {folder}: {error.strerror}; make it readable") from error
    return sorted(name for name in names if not name.startswith("."))


def plain_name(name: str) -> str:
    """Return a name in lower case, with letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def splits_named(folders: Sequence[str]) -> dict[str, list[str]]:
    """Return the folders of each split if the folders are the splits of a data set; {} otherwise.

    A class may be called "train", too. So at least two splits must be there, and at least half of the folders must have
    names of splits, in any case.
    """
    by_split = {split: [name for name in folders if _is_named(name, words)] for split, words in ALIASES.items()}
    found = {split: names for split, names in by_split.items() if names}
    many = 2 * sum(map(len, found.values())) >= len(folders) or len(found) == len(ALIASES)
    return found if len(found) > 1 and many else {}


def _is_named(folder: str, aliases: Sequence[str]) -> bool:
    words = [word for word in re.split(r"[^a-z]+", folder.lower()) if word and word not in FILLERS]
    return len(words) == 1 and words[0] in aliases


def split_of(name: str) -> str | None:
    """Return the split that is a word in the name of a folder or a file; None if there is none, or several."""
    words = re.split(r"[^a-z]+", name.lower())
    if "phase" in words:  # other images of the training classes
        return "train" if words.count("train") == 2 else None
    splits = {split for split, aliases in ALIASES.items() if not set(words).isdisjoint(aliases)}
    return splits.pop() if len(splits) == 1 else None
