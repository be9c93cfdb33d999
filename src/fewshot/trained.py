"""Methods ready for use: restored from a checkpoint, or made from an encoder that needs no training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError
from torch import nn

from fewshot.checkpoints import check_weights, load_checkpoint
from fewshot.config import as_overrides, brings_weights, compose, import_target, search_path, without_initial_weights
from fewshot.directories import checkpoint_at
from fewshot.encoders.adaptable import BatchStatisticsNorm2d
from fewshot.errors import FewShotError, mistake, reason
from fewshot.methods.base import FewShotMethod, require_finite
from fewshot.text import say

FROM_CHECKPOINT = ("dataset", "encoder")  # groups that a checkpoint decides, unless an evaluation chooses other data
REPLACEABLE = ("method", "distance")  # groups that can be chosen in addition to a checkpoint
IMAGE_FORMAT = ("size", "channels", "normalise")  # of a data set, which an encoder was trained for


@dataclass(frozen=True)
class Trained:
    """A method with its weights.

    Attributes:
        path: of the checkpoint; None: the method needed no training.
        method: on the CPU, in evaluation mode.
        config: of its training run; for a method without one, the composed ``conf/train.yaml``.
        checkpoint: the content of the file.
    """

    path: Path | None
    method: FewShotMethod
    config: DictConfig
    checkpoint: dict[str, Any]

    @property
    def name(self) -> str:
        """For messages and results: the path of the checkpoint, or the encoder's name."""
        return str(self.path) if self.path is not None else f"encoder={self.config.choices.encoder}"


def load_trained(
    place: str, *, trust: str | Iterable[str] | None = None, places: Mapping[str, Any] | None = None
) -> Trained:
    """Restore a method from a checkpoint.

    Args:
        place: a run directory or its ``checkpoints``, for the weights with the best validation accuracy, or a
            checkpoint file.
        trust: packages whose code the checkpoint may name, in addition to what this command's configuration names.
        places: ``data_dir`` and ``cache_dir``; None: the default directories.

    Raises:
        FewShotError: there is no checkpoint, it names untrusted code, or its weights do not fit its configuration.
    """
    path = checkpoint_at(Path(place).expanduser())
    checkpoint = load_checkpoint(path, trust=trust, places=places)
    method = restore(path, checkpoint["hyper_parameters"], checkpoint["state_dict"])
    return Trained(path, method, OmegaConf.create(checkpoint["hyper_parameters"]), checkpoint)


def with_chosen_method(trained: Trained, overrides: Iterable[str]) -> Trained:
    """Put the method that a command line chooses on the encoder of a checkpoint.

    Args:
        trained: from the checkpoint.
        overrides: of the command line.

    Returns:
        ``trained`` itself if the overrides choose no method.

    Raises:
        FewShotError: the overrides choose a data set or an encoder, which the checkpoint decides; or a distance without
            a method; or the method has weights of its own, or cannot use the encoder.
    """
    overrides = list(overrides)
    for override in choices_of(overrides, FROM_CHECKPOINT):
        raise FewShotError(f"{override}: a checkpoint decides the {' and the '.join(FROM_CHECKPOINT)}; remove it")
    chosen = choices_of(overrides, REPLACEABLE)
    if not chosen:
        return trained
    if not any(override.partition("=")[0] == "method" for override in chosen):
        raise FewShotError(f"{chosen[0]}: name the method that replaces the checkpoint's, too: method=protonet")
    if any(isinstance(module, BatchStatisticsNorm2d) for module in trained.method.encoder.modules()):
        raise FewShotError(
            f"the encoder in {trained.path} normalises each batch by its own statistics, as MAML trains it, so other "
            "methods cannot use it; choose the checkpoint of another method"
        )
    run = _compose(chosen)
    warn_of_unused_distance(chosen, run)
    method = make_untrained(run.method, f"method={run.choices.method}", trained.method.encoder)
    config = trained.config.copy()
    config.method = {**run.method, "encoder": trained.config.method.get("encoder")}
    config.choices.method, config.choices.distance = run.choices.method, run.choices.distance
    return replace(trained, method=method, config=config)


def with_chosen_data(trained: Trained, overrides: Iterable[str], places: Mapping[str, Any]) -> Trained:
    """Replace the data set of a checkpoint by the one that a command line chooses, in the checkpoint's image format.

    Args:
        trained: from the checkpoint.
        overrides: of the command line.
        places: ``data_dir`` and ``cache_dir``.

    Returns:
        ``trained`` itself if the overrides choose no data set.

    Raises:
        FewShotError: the overrides change the image format, or the data set without naming it, or the images of the
            data set have a different number of channels.
    """
    chosen = choices_of(overrides, ["dataset"])
    if not chosen:
        return trained
    if not any(override.partition("=")[0] == "dataset" for override in chosen):
        raise FewShotError(
            f"{chosen[0]}: the checkpoint decides its data set; to test on another one: dataset=cifar_fs"
        )
    form = {key: trained.config.dataset[key] for key in IMAGE_FORMAT}
    for override in chosen:
        key, _, value = override.partition("=")
        own = form.get(key.rpartition(".")[2])
        if own is not None and value != str(own):
            raise FewShotError(f"{override}: the encoder was trained with {key}={own}, and keeps it; remove it")
    theirs = _compose([*as_overrides(places), *chosen])
    if "channels" not in theirs.dataset.source and theirs.dataset.channels != form["channels"]:
        raise FewShotError(
            f"{chosen[0]}: its images have {theirs.dataset.channels} channels, and the encoder takes {form['channels']}"
        )
    run = _compose([*as_overrides(places), *chosen, *as_overrides({"dataset": form})])
    config = trained.config.copy()
    config.dataset, config.choices.dataset = run.dataset, run.choices.dataset
    return replace(trained, config=config)


def warn_of_other_images(method: Mapping[Any, Any], name: str, split: str) -> None:
    """Warn that an encoder brings weights from elsewhere, which may know the classes of a split.

    Args:
        method: the configuration of the method with that encoder.
        name: what the message is about.
        split: "train", "val" or "test".
    """
    if brings_weights(method):
        say(
            f"warning: {name}: nothing records which images its weights were trained on, and the {split} classes may "
            "be among them (those of miniImageNet are part of ImageNet)",
            error=True,
        )


def warn_of_unused_distance(overrides: Iterable[str], config: DictConfig) -> None:
    """Warn that a command line chooses a distance for a method that has none; results then name no distance.

    Args:
        overrides: of the command line.
        config: what they compose to.
    """
    for override in choices_of(overrides, ["distance"]):
        if "distance" not in config.method:
            say(f"warning: {override} is not used: method={config.choices.method} has no distance", error=True)


def without_training(overrides: Iterable[str], places: Mapping[str, Any]) -> Trained:
    """Make the method that a command line chooses, with an encoder that needs no training.

    Args:
        overrides: of the command line; those of dataset, method, distance and encoder count.
        places: ``data_dir`` and ``cache_dir``.

    Raises:
        FewShotError: the method or the encoder has untrained weights.
    """
    overrides = list(overrides)
    config = _compose([*as_overrides(places), *choices_of(overrides, (*FROM_CHECKPOINT, *REPLACEABLE))])
    warn_of_unused_distance(overrides, config)
    name = f"method={config.choices.method} or encoder={config.choices.encoder}"
    if brings_weights(config.method) is False:
        say(f"warning: encoder={config.choices.encoder} has random weights", error=True)
    return Trained(None, make_untrained(config.method, name), config, {})


def make_untrained(node: DictConfig, name: str, encoder: nn.Module | None = None) -> FewShotMethod:
    """Make a method that needs no training, in evaluation mode.

    Args:
        node: the method's configuration.
        name: for messages.
        encoder: already trained; None: the one that ``node`` describes.

    Raises:
        FewShotError: the method has untrained weights.
    """
    untrained = FewShotError(
        f"{name} has untrained weights: "
        + (
            "train it with encoder.init=RUN_DIR, or choose a method without weights of its own, such as method=protonet"
            if encoder is not None
            else "choose those of a run with checkpoint=RUN_DIR, or choose encoder=pretrained with method=protonet or "
            "method=matching"
        )
    )
    try:
        if encoder is None:
            method: FewShotMethod = instantiate(node)
        else:
            settings = {key: value for key, value in node.items() if key != "encoder"}
            method = instantiate({**settings, "_partial_": True})(encoder=encoder)
    except InterpolationKeyError as error:  # it depends on keys of a training
        raise untrained from error
    except Exception as error:
        if node.get("classes", "") is None:  # the training classes, and there is no training
            raise untrained from error
        raise
    trained = set() if encoder is None else set(encoder.parameters())
    if any(parameter.requires_grad and parameter not in trained for parameter in method.parameters()):
        raise untrained
    return method.eval()


def choices_of(overrides: Iterable[str], groups: Iterable[str]) -> list[str]:
    """The overrides that choose from some groups, or change a key in one."""
    return [override for override in overrides if override.lstrip("+~").partition("=")[0].partition(".")[0] in groups]


def _compose(overrides: Iterable[str]) -> DictConfig:
    """The training configuration with some overrides, from this command's own search path."""
    places = [source.full_path() for source in search_path() if source.scheme() in ("file", "pkg")]
    return compose(*overrides, places=places)


def restore(path: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> FewShotMethod:
    """Restore a saved method, on the CPU and in evaluation mode.

    Args:
        path: of the file, for messages.
        config: of its run, as ``fewshot.trust.read_config`` returns it.
        weights: its state dictionary.

    Raises:
        FewShotError: the weights do not fit the configuration, or are not finite.
    """
    make = without_initial_weights(config["method"])
    kind = import_target(f"{path}: method", make["_target_"])
    try:
        if not isinstance(kind, type) or not issubclass(kind, FewShotMethod):
            raise TypeError(f"{make['_target_']} is not a method")
        check_weights(make, weights)
        method: FewShotMethod = instantiate(make)
        method.load_state_dict(weights)
    except Exception as error:  # its type depends on what is in the file
        raise FewShotError(
            f"the weights in {path} do not fit the method that its configuration describes: "
            f"{mistake(error) or reason(error)}; it may be from a different version: train again"
        ) from error
    require_finite(method, path)
    return method.eval()
