"""Tables that list images and their labels."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fewshot.data.files import ImageFile, is_archive
from fewshot.data.locate import IMAGES, plain_name
from fewshot.errors import FewShotError, shortened

TABLES = (".csv", ".tsv", ".txt")
# Names of the columns, letters only.
IMAGE_COLUMNS = (
    *("filename", "file", "filepath", "path", "name"),
    *(
        f"{image}{what}"
        for image in ("image", "img", "images")
        for what in ("", "name", "filename", "file", "path", "id")
    ),
)
LABEL_COLUMNS = ("label", "labels", "class", "classname", "classid", "category", "wnid", "synset", "target")


def read_table(table: ImageFile) -> list[tuple[str, str]]:
    """Return the rows of a table as images and labels.

    Raises:
        FewShotError: it is not such a table, or not UTF-8.
    """
    try:
        text = table.read().decode("utf-8-sig")
        head = text.splitlines()[0] if text.strip() else ""
        readings = [(delimiter, next(csv.reader([head], delimiter=delimiter), [])) for delimiter in ",;\t"]
        delimiter, header = max(readings, key=lambda reading: (_columns(reading[1]).count(None) * -1, len(reading[1])))
        columns = _columns(header)
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True))
    except UnicodeDecodeError as error:
        raise FewShotError(f"{table.name} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise FewShotError(f"{table.name} is not a table of images and labels: {error}") from error
    if len(header) == 2 and header[0].strip().lower().endswith(IMAGES):
        columns = [0, 1]  # no header
    elif head and None in columns:
        wanted = "images (such as filename)" if columns[0] is None else "labels (such as label)"
        raise FewShotError(f"{table.name} has no column of {wanted}, only {shortened(header)}: rename one")
    else:
        lines = lines[1:]
    rows = [
        tuple(line[column].strip() if column is not None and column < len(line) else "" for column in columns)
        for line in filter(any, lines)
    ]
    if not rows or not all(name and label for name, label in rows):
        raise FewShotError(f"{table.name} has no rows, or rows without an image or a label; download it again")
    return rows  # type: ignore[return-value]


def _columns(header: Sequence[str]) -> list[int | None]:
    """Return the positions of the columns of images and labels."""
    names = [plain_name(name) for name in header]
    return [
        next((names.index(name) for name in known if name in names), None) for known in (IMAGE_COLUMNS, LABEL_COLUMNS)
    ]


class TableImages:
    """Finds images by their names in tables.

    Args:
        place: the directory of the files, for messages.
        tree: all files by their path below it.
    """

    def __init__(self, place: Path, tree: Mapping[str, ImageFile]) -> None:
        self.place, self.tree = place, tree
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in tree:
            if path.lower().endswith(IMAGES):
                name = path.rpartition("/")[2]
                self.by_name[name].append(path)
                self.by_stem[name.rpartition(".")[0]].append(path)

    def find(self, name: str, label: str) -> str | None:
        """Return the path of an image, in any folder and of any image type; None if there is none.

        Args:
            name: of the image in a table.
            label: its class, which is the name of its folder if several images have that name.

        Raises:
            FewShotError: two files match.
        """
        parts = re.split(r"[/\\]", name)
        if ".." in parts:
            return None
        stem = parts[-1].rpartition(".")[0] if parts[-1].lower().endswith(IMAGES) else parts[-1]
        paths = self.by_name.get(parts[-1]) or self.by_stem.get(stem) or []
        if len(paths) > 1:
            paths = [p for p in paths if p.split("/")[-2:-1] == [label]] or paths  # n01/1.jpg and n02/1.jpg
            first = min(map(_rank, paths))
            paths = [path for path in paths if _rank(path) == first]
        if len(paths) > 1:
            raise FewShotError(
                f"{self.place / _container(paths[0])} has two files {parts[-1]}, {self.tree[paths[0]].name} and "
                f"{self.tree[paths[1]].name}: the tables cannot tell them apart; keep one of them there"
            )
        return paths[0] if paths else None


def _container(path: str) -> str:
    """Return the top-level folder or archive of a path; each contains an image at most once."""
    return path.split("/", 1)[0] if "/" in path else ""


def _rank(path: str) -> tuple[bool, bool, str]:
    container = _container(path)
    return is_archive(container), container != "images", container
