"""Where a data set lies below ``data_dir``: one search for all data sets, which knows what it looked for and found."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewshot.data.files import ImageFile, file_at, is_archive, list_archive, list_folder
from fewshot.errors import FewShotError, shortened

# What people call the splits of a data set. "base" and "novel" are those of Hariharan & Girshick (2017).
ALIASES = {
    "train": ("train", "training", "base"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "novel"),
}
FILLERS = ("meta", "set", "split", "data", "image", "images", "classes")  # as in meta_train and "test images"
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Place:
    """A folder that a data set may lie in.

    Attributes:
        path: of the folder; where files lie beside each other in ``data_dir``, that.
        named: it is named after the data set, or an archive that the user names; what lies elsewhere must show that it
            belongs to the data set.
        files: what lies in it, by path; archives are not opened.
    """

    path: Path
    named: bool
    files: Mapping[str, ImageFile]

    def archives(self) -> list[str]:
        """The archives in it, which a data set reads where they lie."""
        return [name for name in self.files if is_archive(name)]

    def opened(self) -> dict[str, ImageFile]:
        """The same files, those of archives included: each archive stands for a folder of its name.

        Raises:
            FewShotError: an archive is broken, or not to be trusted.
        """
        tree = {name: file for name, file in self.files.items() if not is_archive(name)}
        for archive in self.archives():
            tree |= {f"{archive}/{name}": file for name, file in list_archive(self.path / archive).items()}
        return tree


def places(data_dir: Path, name: str, first: tuple[str, ...], belongs: Callable[[Path], bool]) -> Iterator[Place]:
    """The places where a data set may lie, the likeliest first.

    They are the folders in ``data_dir`` that are named after it, ``data_dir`` itself, and its other folders. In what is
    not named after the data set only what belongs to it is looked at.

    Args:
        data_dir: where to search.
        name: of the data set, small letters only; a folder is named after it that has it in its name.
        first: names of folders that go before others.
        belongs: whether a folder or an archive that is not named after the data set may be a part of it.

    Raises:
        FewShotError: a folder cannot be listed, or ``data_dir`` is a file and no archive.
    """

    def after(path: str) -> bool:
        return name in plain_name(path)

    if data_dir.is_file():
        if not is_archive(data_dir.name):
            raise FewShotError(f"data_dir={data_dir} is a file; name the folder that it lies in")
        yield Place(data_dir.parent, True, {data_dir.name: file_at(data_dir)})
        return
    folders = sorted(
        children(data_dir), key=lambda child: (first.index(child) if child in first else len(first), child)
    )
    for child in filter(after, folders):
        yield Place(data_dir / child, True, list_folder(data_dir / child))
    others = [child for child in folders if not after(child) and not belongs(data_dir / child)]
    for folder in [data_dir, *(data_dir / child for child in others)]:
        if folder == data_dir and after(folder.name):
            yield Place(folder, True, list_folder(folder))
        else:
            files = list_folder(folder, enter=lambda child: not after(child) and belongs(folder / child))  # noqa: B023
            kept = {p: f for p, f in files.items() if not is_archive(p) or after(p) or belongs(folder / p)}
            yield Place(folder, False, kept)


def children(folder: Path) -> list[str]:
    """The names of the folders in a folder, links to folders among them; hidden ones are passed over."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FewShotError(f"cannot list the folder {folder}: {error.strerror}; make it readable") from error


def holds(folder: Path) -> str:
    """What a folder contains, for a message."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return f"{folder} holds {shortened(contents(folder)) or 'nothing'}"


def contents(folder: Path) -> list[str]:
    """The names of the files and folders in a folder, those of folders with a slash; hidden ones are left out.

    Raises:
        FewShotError: it cannot be listed.
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
    """A name in small letters, without dashes, underscores and the like."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def splits_named(folders: Sequence[str]) -> dict[str, list[str]]:
    """Return the folders of each split if they are the splits of a data set; {} if they are something else.

    A class may be called "train", too: at least half of the folders are named after a split, in any case, and these
    are of two splits at least.
    """
    by_split = {split: [name for name in folders if _is_named(name, words)] for split, words in ALIASES.items()}
    found = {split: names for split, names in by_split.items() if names}
    many = 2 * sum(map(len, found.values())) >= len(folders) or len(found) == len(ALIASES)
    return found if len(found) > 1 and many else {}


def _is_named(folder: str, aliases: Sequence[str]) -> bool:
    words = [word for word in re.split(r"[^a-z]+", folder.lower()) if word and word not in FILLERS]
    return len(words) == 1 and words[0] in aliases


def split_of(name: str) -> str | None:
    """The split that a folder or a file is named after, as a word in its name; None where it is none, or several."""
    words = re.split(r"[^a-z]+", name.lower())
    if "phase" in words:  # the training classes once more, other images of them
        return "train" if words.count("train") == 2 else None
    splits = {split for split, aliases in ALIASES.items() if not set(words).isdisjoint(aliases)}
    return splits.pop() if len(splits) == 1 else None
