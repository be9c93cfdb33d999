"""What networks of libraries have in common: a size and a normalisation of their own, and weights from files."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import interpolate

from fewshot.errors import FewShotError, reason
from fewshot.files import check_file


class Backbone(nn.Module, ABC):
    """A network of a library's, without its last layer.

    It brings the size and the normalisation that its weights were trained with: what it takes are plain pixels, from 0
    to 1, of any size, grey or RGB.

    Args:
        network: normalised images ``[images, channels, size, size]`` to embeddings ``[images, features]``.
        features: how long an embedding is.
        size: height and width that images are resized to, in pixels.
        mean: of each channel, subtracted from the pixels.
        std: of each channel, which they are divided by.
        frozen: keep the weights, and the statistics of batch norm, as they are.

    Shape:
        float ``[images, 1 or channels, height, width]`` to ``[images, features]``.
    """

    WITHOUT_WEIGHTS: ClassVar[Mapping[str, Any]]  # see ``fewshot.encoders``
    normalise = "plain"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, network: nn.Module, features: int, size: int, mean: Iterable[float], std: Iterable[float], frozen: bool
    ) -> None:
        super().__init__()
        self.network, self.features, self.size, self.frozen = network, features, size, frozen
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor([*values])[:, None, None], persistent=False)
        self.channels = len(self.mean)
        self.requires_grad_(not frozen)
        self.train()
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Self:
        """Train or evaluate; one that is frozen always evaluates."""
        return super().train(mode and not self.frozen)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images: ``[images, features]``."""
        embeddings: torch.Tensor = self.network(self.prepare(images))
        return embeddings

    @abstractmethod
    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """The network's last maps, before it pools them: ``[images, maps, height, width]``.

        Raises:
            FewShotError: it has none.
        """

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and normalise images for the network."""
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


def load_weights(
    network: nn.Module, file: str | Path, rename: Mapping[str, str] | None, last_layers: Iterable[str]
) -> None:
    """Fill a network with the weights in a file: safetensors, or a state dictionary that ``torch.save`` wrote.

    Nothing in the file is run. Every weight of the network has to be there, and nothing else but its last layers.

    Args:
        network: changed in place.
        file: whose tensors lie at its top, or under "state_dict" or "model".
        rename: regular expressions and what replaces them, applied to each name in the file, one after the other.
        last_layers: names of layers whose weights are left out.

    Raises:
        FewShotError: the file cannot be read, or holds other weights.
    """
    path = Path(file).expanduser()
    try:
        state = _read(path)
        for pattern, replacement in (rename or {}).items():
            state = {re.sub(pattern, replacement, name): weight for name, weight in state.items()}
        left_out = tuple(f"{layer}." for layer in last_layers)
        network.load_state_dict({name: weight for name, weight in state.items() if not name.startswith(left_out)})
    except OSError as error:
        raise FewShotError(
            f"cannot read encoder.file={path}: {error.strerror}; name a file with the weights"
        ) from error
    except Exception as error:  # of what kind depends on how the file is broken
        raise unfit(path, error, "name another file by encoder.file=PATH") from error


def unfit(file: Path, error: Exception, fix: str) -> FewShotError:
    """What to raise where a file's content is not the weights of a network."""
    return FewShotError(f"{file} is broken, or holds no weights of this network: {reason(error)}; {fix}")


def _read(path: Path) -> dict[str, torch.Tensor]:
    check_file(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # noqa: PLC0415

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        state = state[name] if isinstance(state.get(name), dict) else state
    return dict(state)
