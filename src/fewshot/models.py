"""The models that come with the package: weights of rows of the tables, each with a card, named like checkpoints.

A model is a folder ``DATASET/CELL/SEED`` below ``MODELS`` with a ``card.json``, which ``fewshot models cards=true``
writes (see ``fewshot.cards``). The command line imports this file, so it imports neither PyTorch nor Lightning.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fewshot.errors import FewShotError, nearest
from fewshot.files import read_json
from fewshot.paths import CHECKOUT, CONF, PACKAGE, ROOT, absolute
from fewshot.text import make_table, say

MODELS = ROOT / "notebooks" / "results" / "reproduction" if CHECKOUT else PACKAGE / "shipped"
CARD, WEIGHTS = "card.json", "weights.safetensors"
NAME = re.compile(r"\w+/\w+(/\d+)?")
FORMAT = 1  # of the cards


@dataclass(frozen=True)
class Model:
    """Trained weights, and where they come from.

    Attributes:
        name: ``DATASET/CELL/SEED``.
        card: see ``fewshot.cards.make_card``.
        folder: of the card.
    """

    name: str
    card: Mapping[str, Any]
    folder: Path

    @property
    def weights(self) -> Path:
        """The file of the weights, which may be shared with a row from the same training, tested on another task."""
        return self.folder.parents[2] / self.card["weights"] / WEIGHTS

    @property
    def task(self) -> str:
        """Task of the test."""
        return f"{self.card['test']['way']}-way {self.card['test']['shot']}-shot"

    @property
    def accuracy(self) -> str:
        """On the test, with its 95% interval, in %."""
        return shown(self.card["test"])

    def check(self) -> None:
        """Compare the file with its digests in the card.

        Raises:
            FewShotError: it is missing, or names what was changed.
        """
        try:
            found = digests(self.weights)
        except OSError as error:
            raise FewShotError(f"{self.weights}, of the model {self.name}: {error.strerror}; restore it") from error
        changed = [part for part in ("configuration", "weights") if found[part] != self.card["sha256"][part]]
        if changed:
            raise FewShotError(
                f"{self.weights}: the {' and the '.join(changed)} changed since the card of {self.name} was written "
                f"(SHA-256 {found[changed[0]][:12]}, and the card has {self.card['sha256'][changed[0]][:12]}); restore "
                "the file"
            )


def shown(estimate: Mapping[str, Any]) -> str:
    """Return an accuracy with its 95% interval, in %."""
    return f"{100 * estimate['accuracy']:.2f} ± {100 * estimate['ci95']:.2f}"


def digests(file: Path) -> dict[str, str]:
    """Return the SHA-256 of a safetensors file and of its two parts: its header is the configuration, then weights."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")  # the length of the header comes first
    parts = {"file": content, "configuration": content[:start], "weights": content[start:]}
    return {part: hashlib.sha256(piece).hexdigest() for part, piece in parts.items()}


def short_names() -> dict[str, str]:
    """Return the models in the package by their short names, see ``conf/models.yaml``."""
    named: dict[str, str] = OmegaConf.to_container(OmegaConf.load(CONF / "models.yaml").named)  # type: ignore[assignment]
    return named


@cache
def all_models(below: Path = MODELS) -> dict[str, Model]:
    """Return all models with a card, by name.

    Raises:
        FewShotError: a card is broken, or of a newer version.
    """
    return {model.name: model for model in map(_read, sorted(below.glob(f"*/*/*/{CARD}")))}


def find(name: str) -> Model | None:
    """Return the model of a name: a short one, ``DATASET/CELL/SEED``, or ``DATASET/CELL`` for the best seed.

    The best seed is that with the best validation accuracy.
    """
    if not NAME.fullmatch(name):
        return None
    models = all_models(MODELS)
    seeds = [model for model in models.values() if model.name.rpartition("/")[0] == name]
    best = max(seeds, key=lambda model: (model.card["validation"] or {}).get("accuracy", 0), default=None)
    return models.get(short_names().get(name, name)) or best


def require(name: str) -> Model:
    """Return the model of a name, see ``find``.

    Raises:
        FewShotError: there is none; names the nearest.
    """
    model = find(name)
    if model is None and name in bare_cells():
        raise FewShotError(f"the weights of {name} were not kept; choose one of {', '.join(names())}")
    if model is None:
        raise FewShotError(f"there is no model {name}{nearest(name, names())}; choose one of {', '.join(names())}")
    return model


def names() -> list[str]:
    """Return the names of all models, the short ones first; of those that differ only in the seed, the common one."""
    short, models = short_names(), all_models(MODELS)
    cells = dict.fromkeys(name.rpartition("/")[0] for name in models if name not in short.values())
    return [*(name for name in short if find(name)), *cells]


def bare_cells() -> list[str]:
    """Return the cells of the tables of which results are kept, but no weights."""
    cells = dict.fromkeys(path.parents[1].relative_to(MODELS).as_posix() for path in MODELS.glob("*/*/*/results.json"))
    return [cell for cell in cells if find(cell) is None]


def is_model(place: str) -> bool:
    """Whether a name is that of a model; an existing path of that name takes precedence, with a message."""
    if find(place) is None:
        return False
    if Path(absolute(place)).exists():
        say(f"using the path {place}, not the model of that name")
        return False
    return True


def show(chosen: Sequence[str]) -> None:
    """Print the cards of some models, or a table of all.

    Raises:
        FewShotError: an unknown name.
    """
    for name in chosen:
        say(*json.dumps(require(name).card, indent=2, ensure_ascii=False).split("\n"))
    if chosen:
        return
    kinds: dict[str, list[tuple[str, Model]]] = {}
    for name in names():
        model = require(name)
        kinds.setdefault("{kind}, {size} × {size}".format(**model.card["expects"]), []).append((name, model))
    for kind, found in kinds.items():
        rows = [(name, model.task, model.accuracy) for name, model in found]
        sizes = sorted({f"{model.card['bytes'] / 1e6:.1f}" for _, model in found}, key=float)
        title = f"For {kind}; weights of {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} MB"
        say(make_table(title, ["name", "test", "accuracy, %"], rows, numbers=["accuracy, %"]))


def _read(path: Path) -> Model:
    name = path.parent.relative_to(path.parents[3]).as_posix()
    try:
        card = read_json(path)
        if card["format"] != FORMAT:
            raise FewShotError(f"{path} has format {card['format']}, this version reads {FORMAT}: install a newer one")
        if not NAME.fullmatch(card["weights"]):
            raise ValueError("its weights are not the name of a model")
        model = Model(name, card, path.parent)
        _ = model.task, model.accuracy, card["sha256"], card["bytes"], card["expects"], card["validation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FewShotError(f"{path} is broken: {error!r}; write it again with fewshot models cards=true") from error
    return model
