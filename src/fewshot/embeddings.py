"""Embed each image once: in validation and test, an embedding depends on nothing but its image."""

import contextlib
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning.strategies import Strategy
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fewshot.data.episodes import Gather
from fewshot.data.images import normalise
from fewshot.digests import digest
from fewshot.errors import FewShotError
from fewshot.files import write_atomically
from fewshot.hardware import send

EMBEDDED_TOGETHER = 256  # images
KEPT = 4 * 2**30  # bytes of embeddings that a cache keeps at most, those used last
KEPT_EACH = 20_000  # most images per network whose embeddings are kept, the most recently used
DIGEST = hashlib.sha256().digest_size
INSTALLED = [
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).resolve().parent,
]
Encoder = Callable[[torch.Tensor], torch.Tensor]  # [images, channels, height, width] to [images, ...]


class LabelledEmbeddings(NamedTuple):
    """The embeddings of all images of some classes.

    Attributes:
        embeddings: ``[images, ...]``.
        labels: the class of each image, int64 ``[images]`` of ``0..classes-1``.
    """

    embeddings: torch.Tensor
    labels: torch.Tensor


class EmbeddingTable:
    """Embeddings of images of a bank, by the positions of the images.

    Args:
        positions: the positions of the images, int64 ``[images]``, without repeats.
        embeddings: ``[images, ...]``, on the same device.
        size: the number of images in the bank.
    """

    def __init__(self, positions: torch.Tensor, embeddings: torch.Tensor, size: int) -> None:
        self.embeddings = embeddings
        self._rows = torch.zeros(size, dtype=torch.int64, device=positions.device)
        self._rows[positions] = torch.arange(len(positions), device=positions.device)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``[..., shape of an embedding]`` at the positions, int64 ``[...]``."""
        return self.embeddings[self._rows[send(positions, self._rows.device)]]


def embed(encoder: Encoder, images: Gather, positions: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """Embed images, a batch at a time.

    The processes share the work. The last bit of an embedding may depend on its batch, so the batches are those of a
    single process.

    Args:
        encoder: embeds each image independently of the others.
        images: loads images by position, on the device of the encoder.
        positions: the images to embed, int64 ``[images]``.
        strategy: the strategy of the trainer, which knows the processes.

    Returns:
        ``[images, ...]``; an embedding can have any shape.
    """
    rank, processes = strategy.global_rank, strategy.world_size  # type: ignore[attr-defined]
    pieces = positions.split(EMBEDDED_TOGETHER)
    # A process without a piece embeds the first one to get the shape of an embedding.
    own = [encoder(images(piece)) for piece in pieces[rank::processes] or pieces[:1]]
    embeddings = own[0].new_zeros(len(positions), *own[0].shape[1:])
    for target, values in zip(embeddings.split(EMBEDDED_TOGETHER)[rank::processes], own, strict=False):
        target.copy_(values)
    return strategy.reduce(embeddings, reduce_op="sum")


def embed_mirrored(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
    """Return the mean embedding of each image and its mirror image, ``[images, ...]``."""
    return (encoder(images) + encoder(images.flip(-1))) / 2


class EmbeddingCache:
    """Embeddings on the disk, for the next evaluation of the same weights on the same images.

    Args:
        folder: safe to empty at any time.
        described: what decides an embedding apart from the weights and the images' positions; becomes JSON.
    """

    def __init__(self, folder: Path, described: Any) -> None:
        self.folder, self._described = folder, json.dumps(described, sort_keys=True, default=str)

    def __call__(self, module: nn.Module, positions: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the embeddings, computed only if they are not in the cache; those from the cache are on the CPU.

        Args:
            module: what embeds; its weights and its source files are part of the key.
            positions: the embedded images, int64 ``[images]``.
            compute: computes the embeddings ``[images, ...]``.
        """
        path = self._path(module, positions)
        if path is None:
            return compute()
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            found = load_file(path)["embeddings"]
            path.touch()
            return found
        computed = compute()
        self._write(path, {"embeddings": computed.contiguous().cpu()})
        return computed

    def each(
        self, module: nn.Module, images: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return embeddings of any images on the CPU, of which only those that are not in the cache are computed.

        An image is found by its pixels as the network sees them, so the key cannot miss a preprocessing step. The file
        may be untrusted: it is data, and what does not fit is computed again.

        Args:
            module: see ``__call__``; it embeds each image independently of the others.
            images: uint8 ``[images, ...]``, one or more.
            compute: from some of the images to their embeddings ``[images, ...]``.
        """
        path = self._path(module)
        if path is None:
            return compute(images)
        keys = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in images]
        known = _read_each(path)
        # At least one, which shows what an embedding is like.
        new = [row for row, key in enumerate(keys) if key not in known] or [0]
        computed = compute(images[new]).cpu()
        if any(value.shape != computed.shape[1:] or value.dtype != computed.dtype for value in known.values()):
            known, new, computed = {}, list(range(len(keys))), compute(images).cpu()
        found = {keys[row]: value for row, value in zip(new, computed, strict=True)}
        used = {key: known[key] if key in known else found[key] for key in keys}
        if used.keys() <= known.keys():
            with contextlib.suppress(OSError):
                path.touch()
        else:
            others = {key: value for key, value in known.items() if key not in used}
            rows = list((others | used).items())[-KEPT_EACH:]
            digests = torch.frombuffer(bytearray(b"".join(key for key, _ in rows)), dtype=torch.uint8)
            values = torch.stack([value for _, value in rows])
            self._write(path, {"digests": digests.unflatten(0, (-1, DIGEST)), "embeddings": values})
        return torch.stack([used[key] for key in keys])

    def _path(self, module: nn.Module, positions: torch.Tensor | None = None) -> Path | None:
        """Return the file for a module; None if its code is in no file: a change to it would go unnoticed."""
        try:  # a source file may be moved or saved while it is read
            kinds = {kind for one in module.modules() for kind in type(one).__mro__ if kind.__module__ != "builtins"}
            made: list[Any] = [normalise, *kinds]
            sources = {str(Path(inspect.getsourcefile(one) or "").resolve()) for one in made}
            if not all(map(_is_installed, sources)):
                sources |= _own_sources()
            code = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(sources)]
        except (OSError, TypeError):
            return None
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        # No tensor of a module has a name with a space.
        described = {} if positions is None else {"positions of the images": positions}
        key = digest({**described, **tensors}, f"{self._described}{code}")
        return self.folder / f"{key}.safetensors"

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with contextlib.suppress(FewShotError, OSError):  # a cache is not worth an error
            write_atomically(path, save(tensors))
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        files = [(file.stat().st_mtime_ns, file) for file in self.folder.glob("*.safetensors")]
        kept = 0
        for _, file in sorted(files, reverse=True):
            kept += file.stat().st_size
            if kept > KEPT:
                file.unlink(missing_ok=True)


def _is_installed(file: str) -> bool:
    """Whether code is part of this package, or of Python and what was installed for it."""
    return any(Path(file).is_relative_to(folder) for folder in INSTALLED)


def _own_sources() -> set[str]:
    """Return the files of the user's own code so far: an encoder may call what any of them defines."""
    named = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    files = {str(Path(name).resolve()) for name in named if name and name.endswith(".py")}
    return {file for file in files if not _is_installed(file) and Path(file).is_file()}  # PyTorch invents some names


def _read_each(path: Path) -> dict[bytes, torch.Tensor]:
    """Return embeddings by the digests of their images; none if the file is missing or is not what ``each`` wrote."""
    try:
        found = load_file(path)
        digests, values = found["digests"], found["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return {}
    if digests.dtype != torch.uint8 or digests.shape != (*values.shape[:1], DIGEST) or not values.isfinite().all():
        return {}
    return dict(zip(map(bytes, digests.numpy()), values, strict=True))
