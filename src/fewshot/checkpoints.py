"""Checkpoint files: written whole or not at all, read without running anything that lies in them."""

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from omegaconf import OmegaConf

from fewshot.config import CONF, outdated
from fewshot.errors import FewShotError


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, each put in place of the last one at once: a kill leaves the old or the new.

    Lightning writes to the system's temporary directory and moves the file from there, which is a copy between disks.
    """

    def save_checkpoint(  # noqa: D102
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        assert storage_options is None
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, or not at all; the directories above it are made.

    Raises:
        FewShotError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a machine that dies could keep the new name and none of the content
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FewShotError(
            f"cannot write {path}: {error.strerror}; what was saved before is kept: make room there, then go on with "
            f"the run by resume=RUN_DIR"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that this program wrote, its tensors on the CPU.

    A file from a stranger can do no harm: it is unpickled by PyTorch's reader of tensors and plain containers alone,
    and its configuration may name only what the files in ``conf`` name, since Hydra calls what ``_target_`` names.

    Raises:
        FewShotError: there is no such file, or it is none of this program's checkpoints.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
        config = checkpoint["hyper_parameters"]
        whole = isinstance(checkpoint["state_dict"], dict) and OmegaConf.is_dict(OmegaConf.create(config))
        foreign = sorted({str(target) for target in _targets(config)} - known_targets())
    except FileNotFoundError:
        raise FewShotError(f"there is no checkpoint {path}; name the directory of a run, or a file in it") from None
    except Exception as error:  # of what kind depends on how the file is broken
        raise _not_ours(path, error) from error
    if not whole:
        raise _not_ours(path, "it holds no weights, or no configuration")
    old = outdated(config)
    if old is not None:
        raise FewShotError(
            f"{path} is of an earlier version of fewshot, which knew {old}: train anew, or use it with that version"
        )
    if foreign:
        raise _not_ours(path, f"its configuration names {', '.join(foreign)}, which no file in conf names")
    return checkpoint


@cache
def known_targets() -> frozenset[str]:
    """Everything that a ``_target_`` in the groups that a run is made of names."""
    return frozenset(
        str(target)
        for group in ("dataset", "method", "distance", "encoder", "optimizer", "schedule")
        for path in (CONF / group).rglob("*.yaml")
        for target in _targets(OmegaConf.to_container(OmegaConf.load(path)))
    )


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)


def _not_ours(path: Path, why: object) -> FewShotError:
    told = str(why).strip().splitlines() or [type(why).__name__]
    return FewShotError(
        f"{path} is broken, or no checkpoint of this program: {told[0]}; name another one, or train anew into another "
        "directory"
    )
