"""What a data set held when a run was trained, beside what it holds now: no class may be tested that was trained on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewshot.data.bank import SPLITS, ImageBank
from fewshot.errors import shortened

MOST_CHARACTERS = 256 * 2**20  # of the record in a checkpoint
Classes = Mapping[str, str | None]  # the name of each class of a split, and the digest of its images where it is known


@dataclass(frozen=True)
class Contents:
    """The classes of each split of a data set.

    Attributes:
        splits: of "train", "val" and "test" the classes, in their order.
        images_sha256: see ``ImageBank``; None: not known.
    """

    splits: Mapping[str, Classes]
    images_sha256: str | None = None

    def to_json(self) -> str:
        """As one text, which a checkpoint keeps: to unpickle thousands of them would take long."""
        return json.dumps({"splits": self.splits, "images_sha256": self.images_sha256})


def contents_of(bank: ImageBank) -> Contents:
    """What the bank of a data set holds."""
    digests = dict(zip(bank.names, bank.class_digests, strict=True)) if bank.class_digests else {}
    splits = {split: {name: digests.get(name) for name in bank.class_names(split)} for split in SPLITS}
    return Contents(splits, bank.images_sha256 or None)


def read_contents(text: Any) -> Contents:
    """What ``Contents.to_json`` wrote, from a file that anyone may have made.

    Raises:
        ValueError: it is something else.
    """
    if type(text) is not str or len(text) > MOST_CHARACTERS:
        raise ValueError("its record of the data is no text")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its record of the data is nested too deeply") from None
    splits, digest = (found.get(key) if isinstance(found, dict) else None for key in ("splits", "images_sha256"))
    if not isinstance(splits, dict) or not all(isinstance(splits.get(split), dict) for split in SPLITS):
        raise ValueError("its record of the data has no classes")
    if not isinstance(digest, str | None):
        raise ValueError("its record of the data has a digest that is not a string")
    if not all(isinstance(one, str | None) for split in SPLITS for one in splits[split].values()):
        raise ValueError("its record of the data has a digest that is not a string")
    return Contents({split: splits[split] for split in SPLITS}, digest)


def read_names(listed: Any) -> Contents:
    """The content of a ``classes.json``, which has names and no digests.

    Raises:
        ValueError: it is something else.
    """
    lists = [listed.get(split) for split in SPLITS] if isinstance(listed, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError("it does not list the classes of each split")
    return Contents({split: dict.fromkeys(listed[split]) for split in SPLITS})


def differences(then: Contents, now: Contents) -> list[str]:
    """What has changed, a line for each kind of change; none: nothing that could be compared has."""
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
        "other images": [name for name in both if _differ(before[name][1], after[name][1])],
    }
    lines = [f"{kind}: {shortened(found, 3)}" for kind, found in changes.items() if found]
    if not lines and _differ(then.images_sha256, now.images_sha256):
        lines.append("the same classes with other images")
    if not lines and any(list(then.splits[split]) != list(now.splits[split]) for split in SPLITS):
        lines.append("the same classes in another order")
    return lines


def known_to(then: Contents, now: Contents, split: str, by_name: bool = True) -> list[str]:
    """The classes that a split has now and that the run has seen: by their names, or by their images.

    Args:
        then: what the run was trained on.
        now: the data at hand.
        split: "test": training and validation, which chose the weights, count as seen; "val": training does; "train":
            nothing does.
        by_name: False: names mean nothing, since the run was trained on another data set.
    """
    seen = [then.splits[of] for of in SPLITS[: SPLITS.index(split)]]
    names = {name for classes in seen for name in classes if by_name}
    digests = {digest for classes in seen for digest in classes.values() if digest is not None}
    return [name for name, digest in now.splits[split].items() if name in names or digest in digests]


def _by_name(contents: Contents) -> dict[str, tuple[str, str | None]]:
    """The split and the digest of each class."""
    return {name: (split, digest) for split in SPLITS for name, digest in contents.splits[split].items()}


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other
