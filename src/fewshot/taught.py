"""Files of classifiers that were taught: what they learned, without the photos and without code."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from fewshot.checkpoints import read_weights, save_weights
from fewshot.data.photos import CROPS
from fewshot.digests import digest
from fewshot.errors import FewShotError
from fewshot.familiarity import Familiarity
from fewshot.learned import Learned, Pixels
from fewshot.methods.auto import Linear
from fewshot.predictor import Predictor, predictor_of
from fewshot.text import say
from fewshot.trained import Trained, restore
from fewshot.trust import INITIAL_WEIGHTS, read_config

NAMES = {str, int, float}  # kinds of labels that a file can hold
PARTS = {"classifier": ("centre", "weight", "bias"), "familiarity": ("centre", "means", "centred")}  # tensors


@dataclass(frozen=True)
class Taught:
    """The content of a file.

    Attributes:
        predictor: applies the method.
        learned: the classes.
        config: of the method, without directories.
        summary: what ``Learned.record`` said when the classes were learned.
    """

    predictor: Predictor
    learned: Learned
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


def save_taught(path: Path, predictor: Predictor, learned: Learned, config: Any, names: Iterable[str] = ()) -> None:
    """Write what a predictor learned to one safetensors file, with its weights and configuration, and no code.

    A method that compares embeddings needs no photos any more, so only the embeddings of the examples are in the file;
    of other methods (MAML), the examples themselves, as the network sees them.

    Args:
        path: the file.
        predictor: its method's weights are saved.
        learned: what it learned.
        config: of its method, without directories.
        names: of the examples, for messages about them.

    Raises:
        FewShotError: the classes are not all strings, or all numbers of one type.
    """
    method = predictor.method
    kinds = {type(name) for name in learned.classes}
    if not (len(kinds) == 1 and kinds <= NAMES):
        named = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise FewShotError(f"classes named by {named} cannot be saved; name them by strings, or by numbers")
    plain: Any = copy.deepcopy(OmegaConf.to_container(config) if isinstance(config, DictConfig) else config)
    # The weights are in the file; where they came from is private.
    encoder = plain["method"].get("encoder", {})
    encoder.update({key: None for key in INITIAL_WEIGHTS if key in encoder})
    content: dict[str, Any] = {
        "classes": list(learned.classes),
        "config": plain,
        "crop": predictor.crop,
        "encoder_sha256": digest(method.encoder.state_dict()),
        "summary": learned.record([Path(name).name for name in names]),
    }
    tensors = {"examples": learned.examples, "labels": learned.labels}
    saved = {"classifier": learned.classify, "familiarity": learned.familiarity}
    for part, value in saved.items():
        if isinstance(value, Linear | Familiarity):
            fields = {key: field for key, field in vars(value).items() if key != "held_out"}
            tensors |= {f"{part}.{key}": fields.pop(key) for key in PARTS[part]}
            content[part] = fields
    save_weights(path, method.state_dict(), content, tensors)


def load_taught(
    place: str | Path, hardware: DictConfig, trust: str | Iterable[str] | None = None, crop: str | None = None
) -> Taught:
    """Load a file written by ``save_taught``. It may be untrusted: no code in it is run.

    Args:
        place: the file.
        hardware: the group of that name.
        trust: packages whose code it may name, see ``read_config``.
        crop: see ``Predictor``; None: as when it was taught.

    Raises:
        FewShotError: it is not such a file, is broken, or names code that is not trusted.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise FewShotError(f"there is no file {path}; write one with fewshot teach support=DIR out={path}")
    content, weights, tensors = read_weights(path)
    if "classes" not in content:
        raise FewShotError(f"{path} has no classes: it is a checkpoint, name it with checkpoint={path} and support=DIR")

    def broken(what: object) -> FewShotError:
        return FewShotError(f"{path} is broken: {what}; teach it again")

    try:
        config = read_config(content.get("config"), path, trust=trust)
    except ValueError as error:
        raise broken(error) from error
    method = restore(path, config, weights)
    if content.get("encoder_sha256") != digest(method.encoder.state_dict()):
        raise broken("its encoder is not the one that embedded its examples")
    taught = content.get("crop")
    if taught not in CROPS:
        raise broken(f"its crop is {taught!r}, and must be one of {', '.join(CROPS)}")
    predictor = predictor_of(Trained(path, method, OmegaConf.create(config), {}), hardware, crop or taught)
    classes, examples, labels = content["classes"], tensors.get("examples"), tensors.get("labels")
    if examples is None or labels is None or not _fit(predictor, classes, examples, labels):
        raise broken("its examples do not fit its classes")
    learned = predictor.learn_examples(tuple(classes), examples, labels, _part(content, tensors, "classifier", Linear))
    if isinstance(learned.classify, Linear) and not _agree(learned.classify, examples, len(classes)):
        raise broken("its classifier does not fit its examples")
    familiarity = _part(content, tensors, "familiarity", Familiarity)
    if familiarity is not None:
        if not _agree(familiarity, examples, len(classes)):
            raise broken("what it knows of unknown images does not fit its examples")
        learned.__dict__["familiarity"] = familiarity  # instead of computing it again
    summary = content.get("summary")
    return Taught(predictor, learned, config, summary if isinstance(summary, dict) else {})


def extend(taught: Taught, support: Mapping[str, Sequence[Pixels]], files: Sequence[str]) -> tuple[Learned, list[str]]:
    """Add classes and examples to those of a file. Copies of its examples are left out, with a line that names them.

    Args:
        taught: the file.
        support: images by the name of their class, see ``Predictor.learn``; classes of the file get more examples.
        files: the names of the images, in order.

    Returns:
        What was learned, and the names of its examples.
    """
    old = taught.learned
    classes = tuple(dict.fromkeys([*old.classes, *support]))
    shots = torch.tensor([len(images) for images in support.values()])
    labels = torch.tensor([classes.index(name) for name in support]).repeat_interleave(shots)
    examples = taught.predictor.represent([image for images in support.values() for image in images])
    new = []
    for number, copy_of in enumerate(old.copies(examples)):
        if copy_of is None or old.labels[copy_of] != labels[number]:
            new.append(number)
        if copy_of is not None:
            label = old.classes[old.labels[copy_of]]
            same = old.labels[copy_of] == labels[number]
            what = "left out, since it is" if same else "also in another class, so they cannot be distinguished:"
            say(f"warning: {files[number]} is {what} an example of {label} in the file", error=True)
    learned = taught.predictor.learn_examples(
        classes, torch.cat([old.examples, examples[new].to(old.examples)]), torch.cat([old.labels, labels[new]])
    )
    return learned, [
        *(f"example {number + 1}" for number in range(len(old.labels))),
        *(files[number] for number in new),
    ]


def _fit(predictor: Predictor, classes: Any, examples: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether the examples in a file can be those of its classes."""
    kinds = {type(name) for name in classes} if isinstance(classes, list) else set()
    if not (len(kinds) == 1 and kinds <= NAMES and len(set(classes)) == len(classes) > 1):
        return False
    blank = predictor.represent([np.zeros((predictor.size, predictor.size, predictor.channels), np.uint8)])
    return (
        examples.dtype.is_floating_point == blank.dtype.is_floating_point
        and (examples.dtype == torch.uint8 or bool(examples.isfinite().all()))
        and examples.shape[1:] == blank.shape[1:]
        and labels.dtype == torch.int64
        and labels.shape == examples.shape[:1]
        and labels.unique().tolist() == list(range(len(classes)))
    )


def _part(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], part: str, kind: type[Any]) -> Any:
    """Make a part from its tensors and numbers; None if the file has none, or one of another kind."""
    fields = content.get(part)
    if not isinstance(fields, dict):
        return None
    try:
        return kind(**fields, **{key: tensors[f"{part}.{key}"] for key in PARTS[part]})
    except (KeyError, TypeError):
        return None


def _agree(part: Linear | Familiarity, examples: torch.Tensor, way: int) -> bool:
    """Whether a part of a file takes its embeddings, and knows its classes."""
    numbers = [value for value in vars(part).values() if isinstance(value, float | int)]
    matrices = (part.weight,) if isinstance(part, Linear) else (part.means, part.centred)
    features = examples.flatten(1).shape[1]
    return (
        all(matrix.shape == (way, features) and bool(matrix.isfinite().all()) for matrix in matrices)
        and part.centre.shape == (features,)
        and bool(part.centre.isfinite().all())
        and (not isinstance(part, Linear) or (part.bias.shape == (way,) and part.temperature > 0))
        and all(abs(number) < 1e9 for number in numbers)
    )
