"""Base class for networks from libraries, which have their own image size, normalisation and weight files."""

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
    """A network from a library, without its last layer.

    It takes plain pixels, from 0 to 1, of any size, grey or RGB, and resizes and normalises them as in the training of
    its weights.

    Args:
        network: maps normalised images ``[images, channels, size, size]`` to embeddings ``[images, features]``.
        features: length of an embedding.
        size: height and width that images are resized to, in pixels.
        mean: per channel, subtracted from the pixels.
        std: per channel; the pixels are divided by it.
        frozen: keep the weights and batch norm statistics unchanged.

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
        """Set training mode; a frozen network always stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images: ``[images, features]``."""
        embeddings: torch.Tensor = self.network(self.prepare(images))
        return embeddings

    @abstractmethod
    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the network's last maps before pooling: ``[images, maps, height, width]``.

        Raises:
            FewShotError: the network has no feature maps.
        """

    @property
    def maps(self) -> int:
        """The number of feature maps, found by embedding an empty image.

        Raises:
            FewShotError: the network has no feature maps.
        """
        training = self.training
        self.eval()  # batch norm must not learn from the image
        with torch.no_grad():
            found = self.feature_maps(torch.zeros(1, self.channels, self.size, self.size)).shape[1]
        self.train(training)
        return found

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and normalise images for the network."""
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


def load_weights(
    network: nn.Module, file: str | Path, rename: Mapping[str, str] | None, last_layers: Iterable[str]
) -> None:
    """Load weights from a file: safetensors, or a state dictionary saved by ``torch.save``.

    No code in the file is run. It must contain every weight of the network, and nothing else but its last layers.

    Args:
        network: changed in place.
        file: its tensors are at the top level, or under "state_dict" or "model".
        rename: regular expressions and their replacements, applied in order to each name in the file; a weight whose
            name becomes empty is ignored.
        last_layers: names of layers whose weights are ignored.

    Raises:
        FewShotError: the file cannot be read, or its weights do not fit the network.
    """
    path = Path(file).expanduser()
    try:
        state = _read(path)
        for pattern, replacement in (rename or {}).items():
            state = {re.sub(pattern, replacement, name): weight for name, weight in state.items()}
        left_out = tuple(f"{layer}." for layer in last_layers)
        network.load_state_dict(
            {name: weight for name, weight in state.items() if name and not name.startswith(left_out)}
        )
    except OSError as error:
        raise FewShotError(
            f"cannot read encoder.file={path}: {error.strerror}; specify a file with the weights"
        ) from error
    except Exception as error:  # the type depends on how the file is broken
        raise unfit(path, error, "specify a different file with encoder.file=PATH") from error


def unfit(file: Path, error: Exception, fix: str) -> FewShotError:
    """Make the error for a file that does not contain the weights of a network."""
    why = "it was not written by torch.save" if isinstance(error, KeyError) else reason(error)  # of an unknown opcode
    return FewShotError(f"{file} is broken, or does not contain weights of this network: {why}; {fix}")


def _read(path: Path) -> dict[str, torch.Tensor]:
    check_file(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # noqa: PLC0415

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        state = state[name] if isinstance(state.get(name), dict) else state
    return dict(state)
