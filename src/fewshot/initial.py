"""``encoder.init``: an encoder that begins with the weights of another run's, of whatever method."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from fewshot.checkpoints import shapes
from fewshot.data.bank import ImageBank
from fewshot.data.contents import Contents, contents_of, known_to
from fewshot.errors import FewShotError, shortened
from fewshot.runs import data_directories, results_file, trained_on
from fewshot.text import say
from fewshot.trained import load_trained


@dataclass(frozen=True)
class InitialEncoder:
    """The encoder of another run.

    Attributes:
        encoder: with its weights, on the CPU.
        path: of the checkpoint.
        sha256: of that file.
    """

    encoder: nn.Module
    path: Path
    sha256: str

    @property
    def record(self) -> dict[str, str]:
        """What the results say of it."""
        return {"checkpoint": str(self.path), "sha256": self.sha256}

    def copy_to(self, encoder: nn.Module) -> None:
        """Give an encoder these weights, and the statistics of batch norm where both have them (MAML has none).

        Raises:
            FewShotError: the two encoders differ in architecture; names the first difference.
        """
        if type(self.encoder) is not type(encoder):
            raise self._other(f"it is a {type(self.encoder).__name__}, and must be a {type(encoder).__name__}")
        theirs, ours = (dict(one.named_parameters()) for one in (self.encoder, encoder))
        buffers, own_buffers = (dict(one.named_buffers()) for one in (self.encoder, encoder))
        common = buffers.keys() & own_buffers.keys()
        found = shapes(theirs | {name: buffers[name] for name in buffers if name in common})
        expected = shapes(ours | {name: own_buffers[name] for name in own_buffers if name in common})
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                there, here = (list(side[name]) if name in side else "not there" for side in (found, expected))
                raise self._other(f"{name} is {there}, and must be {here}")
        with torch.no_grad():
            for name, tensor in (ours | {name: own_buffers[name] for name in common}).items():
                tensor.copy_((theirs | buffers)[name])

    def _other(self, difference: str) -> FewShotError:
        return FewShotError(
            f"encoder.init={self.path} has an encoder of another architecture: {difference}; choose the encoder, and "
            "the size and channels of the images, that it was trained with"
        )


def read_encoder(config: DictConfig, bank: ImageBank) -> InitialEncoder:
    """The encoder of the run that ``encoder.init`` names, as a file that anyone may have made.

    Args:
        config: the composed ``conf/train.yaml``.
        bank: the images to be trained and tested on.

    Raises:
        FewShotError: there is no such run, or it is not complete; its checkpoint is broken, or names code that is not
            trusted; or it has seen classes that are for validation or test here.
    """
    place = Path(config.encoder.init).expanduser()
    run_dir = place if place.is_dir() else place.parents[1] if place.parent.name == "checkpoints" else None
    if run_dir is not None and run_dir.is_dir() and not results_file(run_dir).is_file():
        raise FewShotError(
            f"encoder.init={place}: the run is not complete, since {results_file(run_dir)} is not there; end it first "
            f"by resume={run_dir}, or name another run"
        )
    trained = load_trained(str(place), trust=config.trust, places=data_directories(config))
    _refuse_known_classes(trained_on(trained.checkpoint, run_dir), trained.config, config, bank)
    assert trained.path is not None
    with trained.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InitialEncoder(trained.method.encoder, trained.path, digest)


def _refuse_known_classes(then: Contents | None, theirs: DictConfig, ours: DictConfig, bank: ImageBank) -> None:
    place = ours.encoder.init
    if then is None:
        rank_zero_only(say)(
            f"warning: nothing in encoder.init={place} says which classes it was trained on; they were not compared"
        )
        return
    same_data_set = theirs.dataset.source._target_ == ours.dataset.source._target_
    for split in ("test", "val"):
        known = known_to(then, contents_of(bank), split, by_name=same_data_set)
        if known:
            seen = "trained on, or chosen on," if split == "test" else "trained on"
            raise FewShotError(
                f"encoder.init={place} was {seen} {len(known):,} of the {split} classes: {shortened(known, 3)}; its "
                "encoder knows what it is to be tested on here: name a run on the same split of the data set"
            )
