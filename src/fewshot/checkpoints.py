"""Checkpoint files: written whole or not at all, read without running anything that lies in them."""

import io
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from hydra.utils import instantiate
from lightning_fabric.plugins import TorchCheckpointIO

from fewshot.config import import_target
from fewshot.errors import FewShotError
from fewshot.files import check_file, write_atomically
from fewshot.trust import read_config


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, each put in place of the last one at once: a kill leaves the old or the new.

    Lightning writes to the system's temporary directory and moves the file from there, which is a copy between disks.
    """

    def save_checkpoint(  # noqa: D102
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        assert storage_options is None
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(Path(path), content.getbuffer())


def load_checkpoint(
    path: Path,
    *,
    trust: str | Iterable[str] | None = None,
    places: Mapping[str, Any] | None = None,
    own: Any = None,
) -> dict[str, Any]:
    """A checkpoint that this program wrote, its tensors on the CPU.

    A file from a stranger can do no harm: it is unpickled by PyTorch's reader of tensors and plain containers alone,
    what it takes in memory is what it takes on the disk, and its configuration is what ``read_config`` lets pass.

    Args:
        path: of the file.
        trust: packages whose code its configuration may name, see ``read_config``.
        places: the reader's ``data_dir`` and ``cache_dir``, see ``read_config``.
        own: see ``read_config``.

    Returns:
        All that is in it, the configuration under "hyper_parameters".

    Raises:
        FewShotError: there is no such file; it is none of this program's checkpoints; its configuration names code that
            the reader does not trust; or its weights do not fit the method that it describes.
    """
    try:
        checkpoint = read_tensors(path)
        config = read_config(checkpoint["hyper_parameters"], path, trust=trust, places=places, own=own)
    except FewShotError:
        raise
    except FileNotFoundError:
        raise FewShotError(f"there is no checkpoint {path}; name the directory of a run, or a file in it") from None
    except Exception as error:  # of what kind depends on how the file is broken
        raise _not_ours(path, error) from error
    return {**checkpoint, "hyper_parameters": config}


def read_tensors(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, its configuration not checked yet: tensors and plain containers.

    Raises:
        Exception: it is no such file; of what kind depends on how it is broken.
    """
    check_file(path)
    with path.open("rb") as file:
        _check_archive(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise TypeError(f"it holds a {type(checkpoint).__name__}")
    if not isinstance(checkpoint["state_dict"], dict) or not all(map(_is_whole, checkpoint["state_dict"].values())):
        raise ValueError("it holds no weights")
    return checkpoint


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of each weight."""
    return {name: tensor.shape for name, tensor in state.items()}


def check_weights(method: Mapping[Any, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Hold the sizes in the configuration of a method to its weights, before any memory is taken for them.

    Args:
        method: see ``load_checkpoint``.
        state: the weights.

    Raises:
        ValueError: they differ.
    """
    try:
        with torch.device("meta"):
            expected = shapes(instantiate(method).state_dict())
    except Exception:  # what is wrong shows when the method is made in earnest
        return
    found = shapes(state)
    differing = next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)
    if differing is not None:
        sizes = [list(side[differing]) if differing in side else "not there" for side in (found, expected)]
        raise ValueError(f"{differing} is {sizes[0]}, and must be {sizes[1]}")


def without_initial_weights(method: Mapping[Any, Any]) -> dict[str, Any]:
    """The configuration of a method whose encoder loads no weights, because a checkpoint will bring them."""
    encoder = method.get("encoder")
    if not isinstance(encoder, Mapping) or "_target_" not in encoder:
        return {**method}
    encoder = {key: value for key, value in encoder.items() if key != "init"}
    settings = getattr(import_target("method.encoder", encoder["_target_"]), "WITHOUT_WEIGHTS", {})
    return {**method, "encoder": {**encoder, **settings}}


def _check_archive(file: BinaryIO) -> None:
    """Refuse a file that would take more memory than disk, and the formats that PyTorch wrote long ago."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
        raise ValueError("it is smaller than what it holds")
    file.seek(0)


def _is_whole(value: Any) -> bool:
    """Whether all numbers of a tensor are in the file; one number can be shown as a million by a stride of 0."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _not_ours(path: Path, why: object) -> FewShotError:
    reasons = str(why).strip().splitlines() or [type(why).__name__]
    return FewShotError(
        f"{path} is broken, or no checkpoint of this program: {reasons[0]}; name another one, or train anew into "
        "another directory"
    )
