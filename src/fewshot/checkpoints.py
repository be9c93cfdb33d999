"""Checkpoint files and shared weights: written atomically, read without running any code in them."""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from hydra.utils import instantiate
from lightning_fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.modules.module import register_module_parameter_registration_hook

import fewshot
from fewshot.digests import digest
from fewshot.errors import FewShotError, nearest, reason
from fewshot.files import check_file, write_atomically
from fewshot.models import names
from fewshot.trust import read_config

SHARED = ".safetensors"  # ending of files for others, see ``save_weights``
FORMAT = 1  # version of their content
WEIGHTS = "weights."  # prefix of the method's tensors in them
MAX_METADATA = 10**7  # limit for the length of the metadata in them, characters
NOWHERE = {"data_dir": "", "cache_dir": ""}  # directories are private
MAX_VALUES = 1_000_000  # containers and values of a checkpoint; ours have some thousands
MAX_DEPTH = 64  # containers within containers
MAX_REMOVED = 100  # parameters that a network may make and then remove, like those of a last layer
# Types of weights: complex, quantized or 8-bit numbers cannot be checked to be finite.
NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
NUMBERS |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced atomically: after a kill, there is either the old file or the new one.

    Lightning writes to the system's temporary directory and moves the file, which is a copy if that is another disk.
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
    """Load a checkpoint of this program, with its tensors on the CPU.

    An untrusted file can do no harm: PyTorch unpickles only tensors and plain containers, the content needs no more
    memory than disk space, and ``read_config`` checks the configuration.

    Args:
        path: the file.
        trust: packages whose code its configuration may name, see ``read_config``.
        places: the user's ``data_dir`` and ``cache_dir``, see ``read_config``.
        own: see ``read_config``.

    Returns:
        The whole content; the checked configuration is under "hyper_parameters".

    Raises:
        FewShotError: the file does not exist or is not a checkpoint of this program, or its configuration names code
            that is not trusted.
    """
    try:
        checkpoint = _shared(path) if path.suffix == SHARED else read_tensors(path)
        config = read_config(checkpoint["hyper_parameters"], path, trust=trust, places=places, own=own)
    except FewShotError:
        raise
    except FileNotFoundError:
        near = nearest("/".join(path.parts[-2:]), names())
        raise FewShotError(
            f"there is no checkpoint {path}{near}; name the directory of a run, a file in it, or one of fewshot models"
        ) from None
    except Exception as error:  # the type depends on how the file is broken
        raise _not_ours(path, error) from error
    return {**checkpoint, "hyper_parameters": config}


def read_tensors(path: Path) -> dict[str, Any]:
    """Read the content of a checkpoint: tensors and plain containers, with the configuration still unchecked.

    Raises:
        Exception: it is not such a file; the type depends on how it is broken.
    """
    check_file(path)
    with path.open("rb") as file:
        _check_archive(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise TypeError(f"it contains a {type(checkpoint).__name__}")
    return _checked(checkpoint)


def save_weights(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    content: Mapping[str, Any],
    others: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights and what describes them to one safetensors file, atomically: no code, and no pickle.

    Args:
        path: the file.
        weights: the state dictionary of a method.
        content: becomes JSON; the configuration of the run is under "config".
        others: further tensors.
    """
    tensors = {f"{WEIGHTS}{name}": value for name, value in weights.items()} | {**(others or {})}
    whole = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    described = {"format": FORMAT, "version": fewshot.__version__, **content}
    text = json.dumps({**described, "sha256": _digest_of(whole, described)})
    write_atomically(path, save(whole, {"fewshot": text}))


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Read a file written by ``save_weights``; it may be untrusted.

    Returns:
        The content, with the configuration still unchecked; the weights; and the other tensors.

    Raises:
        FewShotError: it is not such a file, has changed since it was saved, or is of a newer version.
    """
    try:
        check_file(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("fewshot", "")
            if len(text) > MAX_METADATA:
                raise ValueError("its metadata are too long")
            content = json.loads(text)
            if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] < 1:
                raise ValueError("it does not say what its weights are")
            if content["format"] > FORMAT:
                raise FewShotError(
                    f"{path} has format {content['format']}, and this version reads {FORMAT}: install a newer version"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Files of earlier versions have no digest. It detects damage, not tampering: an attacker would write a new
        # digest.
        saved = content.pop("sha256", None)
        if saved is not None and saved != _digest_of(tensors, content):
            raise ValueError("it has changed since it was saved, and its digest is different")
    except (OSError, RecursionError, SafetensorError, ValueError) as error:
        raise FewShotError(
            f"{path} is broken, or holds no weights saved by this program: {reason(error)}; name a different file"
        ) from error
    weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    return content, weights, {name: value for name, value in tensors.items() if not name.startswith(WEIGHTS)}


def _digest_of(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> str:
    return digest(dict(sorted(tensors.items())), json.dumps(content))


def _shared(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(path)
    content, weights, _ = read_weights(path)
    return _checked({**content, "state_dict": weights, "hyper_parameters": content.get("config")})


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each weight."""
    return {name: tensor.shape for name, tensor in state.items()}


def check_weights(method: Mapping[Any, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Check the sizes in the configuration of a method against its weights, before allocating memory for them.

    Args:
        method: the configuration, see ``load_checkpoint``.
        state: the weights.

    Raises:
        ValueError: they differ.
    """
    made, most = 0, 2 * len(state) + MAX_REMOVED

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError

    try:
        with torch.device("meta"), register_module_parameter_registration_hook(count):
            expected = shapes(instantiate(method).state_dict())
    except Exception:  # shown later, when the method is made for real
        if made > most:
            raise ValueError(f"its configuration describes more layers than its {len(state)} weights") from None
        return
    actual = shapes(state)
    differing = next((name for name in {**expected, **actual} if expected.get(name) != actual.get(name)), None)
    if differing is not None:
        sizes = [list(side[differing]) if differing in side else "missing" for side in (actual, expected)]
        raise ValueError(f"{differing} is {sizes[0]}, and must be {sizes[1]}")


def _check_archive(file: BinaryIO) -> None:
    """Reject files that would need more memory than disk space, and old formats of PyTorch."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
        raise ValueError("it is smaller than its content")
    file.seek(0)


def _checked(checkpoint: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(checkpoint["state_dict"], dict) or not all(map(_is_whole, checkpoint["state_dict"].values())):
        raise ValueError("it contains no weights")
    _check_containers(checkpoint)
    _check_record(checkpoint)
    return checkpoint


def _check_containers(checkpoint: dict[str, Any]) -> None:
    """Reject containers that contain each other so often that copying them would never end."""
    waiting: list[tuple[Any, int]] = [(checkpoint, 0)]
    for _ in range(MAX_VALUES):
        if not waiting:
            return
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            break
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        waiting += [(one, depth + 1) for one in inner]
    raise ValueError("its containers are nested too deeply, or there are too many")


def _check_record(checkpoint: Mapping[str, Any]) -> None:
    """Reject a record of the training that is not what ``fewshot.callbacks.Record`` saves."""
    callbacks = checkpoint.get("callbacks", {})
    if not isinstance(callbacks, dict) or not all(type(name) is str and name.isprintable() for name in callbacks):
        raise ValueError("its callbacks are not a mapping with names")
    record = callbacks.get("Record", {})
    if not isinstance(record, dict):
        raise ValueError("its Record is not a mapping")
    validations, precisions, initial = (record.get(key) for key in ("validations", "precisions", "encoder_init"))
    if not (
        _is_number(record.get("seconds", 0))
        and isinstance([] if validations is None else validations, list)
        and all(_is_validation(validation) for validation in validations or ())
        and isinstance([] if precisions is None else precisions, list)
        and all(type(precision) is str for precision in precisions or ())
        and isinstance({} if initial is None else initial, dict)
        and all(type(value) is str for entry in (initial or {}).items() for value in entry)
    ):
        raise ValueError("its Record has a value that no training saves")


def _is_validation(value: Any) -> bool:
    # The interval over a single episode is not finite.
    return (
        isinstance(value, dict)
        and all(type(key) is str and type(number) in (int, float) for key, number in value.items())
        and type(value.get("trained_episodes")) is int
        and 0 <= value.get("accuracy", -1) <= 1
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    """Whether the file contains every number of a tensor; with a stride of 0, one number could stand for a million."""
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.dtype in NUMBERS
        and value.layout == torch.strided
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _not_ours(path: Path, why: object) -> FewShotError:
    reasons = str(why).strip().splitlines() or [type(why).__name__]
    return FewShotError(
        f"{path} is broken, or not a checkpoint of this program: {reasons[0]}; name a different one, or train "
        "again in another directory"
    )
