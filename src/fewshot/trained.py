"""A trained method, made again from its checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fewshot.checkpoints import check_weights, load_checkpoint, without_initial_weights
from fewshot.config import import_target
from fewshot.errors import FewShotError, mistake, reason
from fewshot.methods.base import FewShotMethod, require_finite
from fewshot.runs import best_checkpoint


@dataclass(frozen=True)
class Trained:
    """A method with the weights of a checkpoint.

    Attributes:
        path: of the checkpoint.
        method: on the CPU, in evaluation.
        config: of its run, as composed then.
        checkpoint: all that is in the file.
    """

    path: Path
    method: FewShotMethod
    config: DictConfig
    checkpoint: dict[str, Any]


def load_trained(
    place: str, *, trust: str | Iterable[str] | None = None, places: Mapping[str, Any] | None = None
) -> Trained:
    """Read a checkpoint and make its method again.

    Args:
        place: the directory of a run, for the weights that were best on validation classes; or a file in it.
        trust: packages whose code the checkpoint may name, beside what the configuration files of this command name.
        places: where data sets and image banks lie, ``data_dir`` and ``cache_dir``; None: the default places.

    Raises:
        FewShotError: there is no checkpoint, it names other code, or its weights do not fit the method that its
            configuration describes.
    """
    path = Path(place).expanduser()
    path = best_checkpoint(path) if path.is_dir() else path
    checkpoint = load_checkpoint(path, trust=trust, places=places)
    method = restore(path, checkpoint["hyper_parameters"], checkpoint["state_dict"])
    return Trained(path, method, OmegaConf.create(checkpoint["hyper_parameters"]), checkpoint)


def restore(path: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> FewShotMethod:
    """Make a method again from what was saved of it; it is in evaluation, on the CPU.

    Args:
        path: of the file, for messages.
        config: of its run, as ``fewshot.trust.read_config`` lets it pass.
        weights: its state dictionary.

    Raises:
        FewShotError: the weights do not fit the configuration, or are not finite.
    """
    make = without_initial_weights(config["method"])
    kind = import_target(f"{path}: method", make["_target_"])
    try:
        if not isinstance(kind, type) or not issubclass(kind, FewShotMethod):
            raise TypeError(f"{make['_target_']} is no method")
        check_weights(make, weights)
        method: FewShotMethod = instantiate(make)
        method.load_state_dict(weights)
    except Exception as error:  # of what kind depends on what is in the file
        raise FewShotError(
            f"the weights in {path} do not fit the method that its configuration describes: "
            f"{mistake(error) or reason(error)}; it may be of another version: train anew"
        ) from error
    require_finite(method, path)
    return method.eval()
