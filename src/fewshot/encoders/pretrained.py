"""Networks of torchvision, with the weights that were learnt on ImageNet."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from fewshot.errors import FewShotError, reason


class Pretrained(nn.Module):
    """A classifier of torchvision's without its last linear layer.

    It brings the size and the normalisation that its weights were learnt with: what it takes are plain pixels, from 0
    to 1, of any size, grey or RGB.

    Args:
        name: of a model in ``torchvision.models`` that classifies images.
        weights: torchvision's name of the weights, "DEFAULT" for its best. They are downloaded where absent.
        file: a state dictionary to load in their place, of the same model; its last layer is passed over.
        frozen: keep the weights, and the statistics of batch norm, as they are.
        load: False leaves the weights random, for a checkpoint to fill in.

    Raises:
        FewShotError: there is no such model, or none that can be used, or no such weights; they cannot be had, or do
            not fit.

    Shape:
        float ``[images, 1 or 3, height, width]`` to ``[images, features]``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, weights: str, file: str | None, frozen: bool, load: bool = True) -> None:
        super().__init__()
        known = _find(name, weights)
        transforms = known.transforms()
        self.size = int(transforms.crop_size[0])
        for of in ("mean", "std"):
            self.register_buffer(of, torch.tensor(getattr(transforms, of))[:, None, None], persistent=False)
        load = load and not self.mean.is_meta
        self.network = _download(name, known) if load and file is None else get_model(name, weights=None)
        head, self.features = _behead(self.network)
        if load and file is not None:
            _fill(self.network, head, Path(file).expanduser())
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train()
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "Pretrained":
        """Train or evaluate; one that is frozen always evaluates."""
        return super().train(mode and not self.frozen)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images: ``[images, features]``."""
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = interpolate(images, size, mode="bilinear", antialias=True)
        return self.network((images - self.mean) / self.std)


def _find(name: str, weights: str) -> WeightsEnum:
    if name not in list_models(module=torchvision.models):
        raise FewShotError(
            f"encoder.name={name} is no model of torchvision that classifies images: choose resnet18, "
            "mobilenet_v3_small, convnext_tiny, vit_b_16 or another of torchvision.models"
        )
    of_model: Any = get_model_weights(name)
    if weights not in of_model.__members__:
        raise FewShotError(f"encoder.weights={weights} is unknown for {name}: choose {', '.join(of_model.__members__)}")
    return of_model[weights]


def _behead(network: nn.Module) -> tuple[str, int]:
    """Take the last linear layer away; returns its name and how many features reach it."""
    layers = [(name, of) for name, of in network.named_modules() if isinstance(of, nn.Linear)]
    if not layers or hasattr(network, "aux_logits"):
        raise FewShotError(
            f"encoder.name={type(network).__name__.lower()} does not end in one linear layer, so it gives no "
            "embedding; choose another model"
        )
    name, head = layers[-1]
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return name, head.in_features


def _download(name: str, weights: WeightsEnum) -> nn.Module:
    place = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return get_model(name, weights=weights)
    except OSError as error:
        raise FewShotError(
            f"the weights {weights} are not in {place.parent} and cannot be downloaded from {weights.url}: "
            f"{getattr(error, 'reason', error)}; put {place.name} there, or name the file by encoder.file=PATH"
        ) from error
    except Exception as error:
        raise _unfit(place, error, "delete it, and it is downloaded again") from error


def _fill(network: nn.Module, head: str, file: Path) -> None:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith(f"{head}.")})
    except OSError as error:
        raise FewShotError(
            f"cannot read encoder.file={file}: {error.strerror}; name a file with the weights"
        ) from error
    except Exception as error:
        raise _unfit(file, error, "name another file by encoder.file=PATH") from error


def _unfit(file: Path, error: Exception, mend: str) -> FewShotError:
    """Of what kind the error is depends on how the file is broken."""
    return FewShotError(f"{file} is broken, or holds no weights of this network: {reason(error)}; {mend}")
