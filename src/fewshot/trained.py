"""A trained method, made again from its checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from fewshot.checkpoints import load_checkpoint
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


def load_trained(place: str) -> Trained:
    """Read a checkpoint and make its method again.

    Args:
        place: the directory of a run, for the weights that were best on validation classes; or a file in it.

    Raises:
        FewShotError: there is no checkpoint, or its weights do not fit the method that its configuration describes.
    """
    path = Path(place).expanduser()
    path = best_checkpoint(path) if path.is_dir() else path
    checkpoint = load_checkpoint(path)
    try:
        config = OmegaConf.create(checkpoint["hyper_parameters"])
        make = config.method.copy()
        if "weights" in make.encoder:
            make.encoder.load = False  # what a pretrained encoder began with is not asked for again
        if not issubclass(get_object(make._target_), FewShotMethod):
            raise TypeError(f"{make._target_} is no method")
        method = instantiate(make)
        method.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # of what kind depends on what is in the file
        raise FewShotError(
            f"the weights in {path} do not fit the method that its configuration describes: "
            f"{mistake(error) or reason(error)}; it may be of another version: train anew"
        ) from error
    require_finite(method, path)
    return Trained(path, method.eval(), config, checkpoint)
