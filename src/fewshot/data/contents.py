"""The contents of a data set when a run was trained, compared with today's: no training class may be tested."""

import base64
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fewshot.data.bank import SPLITS, ImageBank
from fewshot.errors import shortened

MAX_CHARACTERS = 256 * 2**20  # of the record in a checkpoint, unpacked
DIGITS = 12  # kept of the digest of a class, so that files stay small; ``images_sha256`` is whole
WORDNET = re.compile(r"(?:.*/)?(n\d{8})")  # names that mean the same in all data sets made from ImageNet
Classes = Mapping[str, str | None]  # the classes of a split by name, with the digest of their images or None if unknown


@dataclass(frozen=True)
class Contents:
    """The classes of each split of a data set.

    Attributes:
        splits: the classes of "train", "val" and "test", in order.
        images_sha256: see ``ImageBank``; None if unknown.
    """

    splits: Mapping[str, Classes]
    images_sha256: str | None = None

    def pack(self) -> str:
        """Return one short string for a checkpoint: compressed JSON in base64."""
        text = json.dumps({"splits": self.splits, "images_sha256": self.images_sha256})
        return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def contents_of(bank: ImageBank) -> Contents:
    """Return the contents of an image bank."""
    short = [digest[:DIGITS] for digest in bank.class_digests]
    digests = dict(zip(bank.names, short, strict=True)) if short else {}
    splits = {split: {name: digests.get(name) for name in bank.class_names(split)} for split in SPLITS}
    return Contents(splits, bank.images_sha256 or None)


def read_contents(text: Any) -> Contents:
    """Read what ``Contents.pack`` wrote, or the plain JSON with longer digests of earlier versions; untrusted.

    Raises:
        ValueError: the text is something else.
    """
    if type(text) is not str or len(text) > MAX_CHARACTERS:
        raise ValueError("its record of the data is not a string")
    try:
        found = json.loads(text if text.startswith("{") else _unpacked(text))
    except RecursionError:
        raise ValueError("its record of the data is nested too deeply") from None
    splits, digest = (found.get(key) if isinstance(found, dict) else None for key in ("splits", "images_sha256"))
    if not isinstance(splits, dict) or not all(isinstance(splits.get(split), dict) for split in SPLITS):
        raise ValueError("its record of the data has no classes")
    if not isinstance(digest, str | None):
        raise ValueError("its record of the data has a digest that is not a string")
    if not all(isinstance(value, str | None) for split in SPLITS for value in splits[split].values()):
        raise ValueError("its record of the data has a digest that is not a string")
    short = {split: {name: value and value[:DIGITS] for name, value in splits[split].items()} for split in SPLITS}
    return Contents(short, digest)


def _unpacked(text: str) -> bytes:
    """Return what was compressed, but never more than ``MAX_CHARACTERS``."""
    compressed = zlib.decompressobj()
    try:
        content = compressed.decompress(base64.b64decode(text, validate=True), MAX_CHARACTERS)
    except zlib.error:
        raise ValueError("its record of the data cannot be decompressed") from None
    if not compressed.eof:
        raise ValueError("its record of the data is cut off or too long")
    return content


def read_names(listed: Any) -> Contents:
    """Read the contents of a ``classes.json``, which has names but no digests.

    Raises:
        ValueError: the file contains something else.
    """
    lists = [listed.get(split) for split in SPLITS] if isinstance(listed, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError("it does not list the classes of each split")
    return Contents({split: dict.fromkeys(listed[split]) for split in SPLITS})


def differences(then: Contents, now: Contents) -> list[str]:
    """Return one line for each kind of change; none if nothing that can be compared has changed."""
    before, after = _by_name(then), _by_name(now)
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    old_name = {digest: name for name in removed if (digest := before[name][1]) is not None}
    renamed = {name: old_name[digest] for name in added if (digest := after[name][1]) in old_name}
    both = [name for name in before if name in after]
    changes = {
        "added": [f"{name} ({after[name][0]})" for name in added if name not in renamed],
        "removed": [f"{name} ({before[name][0]})" for name in removed if name not in renamed.values()],
        "renamed": [f"{old} ({before[old][0]}) to {name} ({after[name][0]})" for name, old in renamed.items()],
        "in another split": [
            f"{name} (was {before[name][0]}, is {after[name][0]})" for name in both if before[name][0] != after[name][0]
        ],
        "different images": [name for name in both if _differ(before[name][1], after[name][1])],
    }
    lines = [f"{kind}: {shortened(found, 3)}" for kind, found in changes.items() if found]
    if not lines and _differ(then.images_sha256, now.images_sha256):
        lines.append("the same classes with different images")
    if not lines and any(list(then.splits[split]) != list(now.splits[split]) for split in SPLITS):
        lines.append("the same classes in a different order")
    return lines


def known_to(then: Contents, now: Contents, split: str, by_name: bool = True) -> list[str]:
    """Return the classes of a split that the run has seen, by their names or by their images.

    Args:
        then: what the run was trained on.
        now: the current data.
        split: for "test", training classes and validation classes, which chose the weights, count as seen; for "val",
            training classes; for "train", none.
        by_name: False if the run was trained on a different data set, where only WordNet's names mean the same.
    """
    seen = [then.splits[earlier] for earlier in SPLITS[: SPLITS.index(split)]]
    names = {meaning for classes in seen for name in classes if (meaning := _meaning(name, by_name))}
    digests = {digest for classes in seen for digest in classes.values() if digest is not None}
    classes = now.splits[split].items()
    return [name for name, digest in classes if _meaning(name, by_name) in names or digest in digests]


def known_to_any(seen: Iterable[tuple[str, Contents]], now: Contents, source: str, split: str) -> list[str]:
    """Return the classes of a split that any of several trainings has seen, see ``known_to``.

    Args:
        seen: for each training, the ``_target_`` of its data set and its contents.
        now: the current data.
        source: the ``_target_`` of the current data set.
        split: see ``known_to``.
    """
    known = [known_to(then, now, split, by_name=theirs == source) for theirs, then in seen]
    return list(dict.fromkeys(chain.from_iterable(known)))


def _meaning(name: str, by_name: bool) -> str | None:
    match = WORDNET.fullmatch(name)
    return name if by_name else match and match[1]


def _by_name(contents: Contents) -> dict[str, tuple[str, str | None]]:
    """Return the split and the digest of each class."""
    return {name: (split, digest) for split in SPLITS for name, digest in contents.splits[split].items()}


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other
