"""``encoder.init``: start with the encoder weights of another run, of any method."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from fewshot.checkpoints import shapes
from fewshot.data.bank import ImageBank
from fewshot.data.contents import contents_of, known_to_any
from fewshot.directories import checkpoint_at, results_file
from fewshot.encoders.adaptable import RANDOM
from fewshot.errors import FewShotError, shortened
from fewshot.paths import run_directory
from fewshot.runs import data_directories, trained_before, trained_on
from fewshot.text import say
from fewshot.trained import load_trained


@dataclass(frozen=True)
class InitialEncoder:
    """The encoder of another run.

    Attributes:
        encoder: the encoder with its weights, on the CPU.
        path: the checkpoint.
        sha256: the digest of that file.
        trained_before: what the encoder was trained on, in that run and in those it started from: for each, the
            ``_target_`` of its data set as "source", and ``Contents.pack`` as "data".
    """

    encoder: nn.Module
    path: Path
    sha256: str
    trained_before: Sequence[dict[str, str]]

    @property
    def record(self) -> dict[str, str]:
        """The fields for ``results.json``."""
        return {"checkpoint": str(self.path), "sha256": self.sha256}

    def copy_to(self, encoder: nn.Module) -> None:
        """Copy the weights to an encoder, and the statistics of batch norm if both have them (MAML has none).

        Warns if their layers without weights, such as activations, differ: the same weights then compute something
        different.

        Raises:
            FewShotError: the two encoders differ in architecture; names the first difference.
        """
        if type(self.encoder) is not type(encoder):
            raise self._mismatch(f"it is a {type(self.encoder).__name__}, and must be a {type(encoder).__name__}")
        theirs, ours = (dict(module.named_parameters()) for module in (self.encoder, encoder))
        buffers, own_buffers = (dict(module.named_buffers()) for module in (self.encoder, encoder))
        common = buffers.keys() & own_buffers.keys()
        found = shapes(theirs | {name: buffers[name] for name in buffers if name in common})
        expected = shapes(ours | {name: own_buffers[name] for name in own_buffers if name in common})
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                there, here = (list(side[name]) if name in side else "missing" for side in (found, expected))
                raise self._mismatch(f"{name} is {there}, and must be {here}")
        self._compare_layers(encoder)
        with torch.no_grad():
            for name, tensor in (ours | {name: own_buffers[name] for name in common}).items():
                tensor.copy_((theirs | buffers)[name])

    def _compare_layers(self, encoder: nn.Module) -> None:
        there, here = _without_weights(self.encoder), _without_weights(encoder)
        if there != here:
            more, fewer = (
                ", ".join(f"{number} {kind}" for kind, number in extra.items()) or "none"
                for extra in (there - here, here - there)
            )
            rank_zero_only(say)(
                f"warning: encoder.init={self.path} has different layers without weights ({more}; here {fewer}), so "
                "the same weights compute something different; set the keys of encoder as in that run, unless this is "
                "what you want",
                error=True,
            )

    def _mismatch(self, difference: str) -> FewShotError:
        return FewShotError(
            f"encoder.init={self.path} has an encoder with a different architecture: {difference}; choose the encoder, "
            "image size and channels that it was trained with"
        )


def _without_weights(encoder: nn.Module) -> Counter[str]:
    """Return the types of the layers without weights and statistics, but those that do nothing in a test."""
    leaves = (module for module in encoder.modules() if not list(module.children()) and not module.state_dict())
    kinds = (type(module).__name__ for module in leaves if not isinstance(module, nn.Identity))
    return Counter(kind for kind in kinds if not RANDOM.search(kind))


def read_encoder(config: DictConfig, bank: ImageBank) -> InitialEncoder:
    """Read the encoder of the run that ``encoder.init`` names; the file is untrusted.

    Args:
        config: the composed ``conf/train.yaml``.
        bank: the images to train and test on.

    Raises:
        FewShotError: the run does not exist or is incomplete; its checkpoint is broken or names code that is not
            trusted; or it was trained on validation or test classes of this run.
    """
    path = Path(config.encoder.init).expanduser()
    file = checkpoint_at(path)
    run_dir = Path(run_directory(str(file)))
    copied = file.parent == run_dir  # without its run, which cannot be completed
    if not copied and file.is_file() and not results_file(run_dir).is_file():
        raise FewShotError(
            f"encoder.init={path}: the run is not complete, since {results_file(run_dir)} is missing; complete it "
            f"first with resume={run_dir}, or name another run"
        )
    trained = load_trained(str(path), trust=config.trust, places=data_directories(config))
    then = trained_on(trained.checkpoint, run_dir)
    assert trained.path is not None
    seen = trained_before(trained.checkpoint, trained.path)
    if then is not None:
        seen.append((trained.config.dataset.source._target_, then))
    else:
        rank_zero_only(say)(
            f"warning: encoder.init={path} does not record its training classes, so they were not compared",
            error=True,
        )
    now = contents_of(bank)
    for split in ("test", "val"):
        known = known_to_any(seen, now, config.dataset.source._target_, split)
        if known:
            how = "trained on, or chosen on," if split == "test" else "trained on"
            raise FewShotError(
                f"encoder.init={path} was {how} {len(known):,} of the {split} classes: {shortened(known, 3)}; its "
                "encoder knows classes that it would be tested on here: name a run on the same split of the data set"
            )
    with trained.path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    record = [{"source": source, "data": contents.pack()} for source, contents in seen]
    return InitialEncoder(trained.method.encoder, trained.path, digest, record)
