"""Networks from torchvision, with weights trained on ImageNet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from fewshot.encoders.backbone import Backbone, load_weights, unfit
from fewshot.errors import FewShotError, reason


class Pretrained(Backbone):
    """A torchvision classifier without its last linear layer; see ``Backbone``.

    Args:
        name: of an image classification model in ``torchvision.models``.
        weights: torchvision's name of the weights, "DEFAULT" for the best ones. Downloaded if missing. None: random
            weights.
        file: load weights of the same model from this file instead, see ``load_weights``.
        rename: renames the weights in the file, see ``load_weights``.
        frozen: keep the weights and batch norm statistics unchanged.
        load: False leaves the weights random, to be filled from a checkpoint.
        settings: further arguments of the model.

    Raises:
        FewShotError: the model or weights are unknown or unusable, cannot be downloaded, or do not fit.
    """

    WITHOUT_WEIGHTS: ClassVar[Mapping[str, Any]] = {"load": False}

    def __init__(
        self,
        name: str = "resnet18",
        weights: str | None = "DEFAULT",
        file: str | None = None,
        frozen: bool = True,
        load: bool = True,
        rename: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        known = _find(name, "DEFAULT" if weights is None else weights)
        download = load and file is None and weights is not None
        try:
            network = _download(name, known, settings) if download else get_model(name, weights=None, **settings)
        except FewShotError:
            raise
        except Exception as error:  # each model rejects settings in its own way
            raise FewShotError(f"encoder.name={name} rejects its settings: {reason(error)}; correct them") from error
        head, features = _behead(network)
        if load and file is not None:
            load_weights(network, file, rename, [head])
        transforms = known.transforms()
        super().__init__(network, features, int(transforms.crop_size[0]), transforms.mean, transforms.std, frozen)
        self._head = head.partition(".")[0]

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """See ``Backbone``: the input of the last adaptive pooling, or if there is none, of the head."""
        seen: list[torch.Tensor] = []
        pools = [module for module in self.network.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
        last = [child for name, child in self.network.named_children() if name != self._head][-1]
        hook = (
            pools[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            if pools
            else last.register_forward_hook(lambda *passed: seen.append(passed[-1]))
        )
        with hook:
            self(images)
        if not seen or seen[-1].ndim != 4:
            raise FewShotError(
                f"the encoder {type(self.network).__name__} of torchvision has no feature maps; choose a convolutional "
                "network, such as encoder.name=resnet18"
            )
        return seen[-1]


def _find(name: str, weights: str) -> WeightsEnum:
    if name not in list_models(module=torchvision.models):
        raise FewShotError(
            f"encoder.name={name} is not an image classification model of torchvision: choose resnet18, "
            "mobilenet_v3_small, convnext_tiny, vit_b_16 or any other in torchvision.models"
        )
    known: Any = get_model_weights(name)
    if weights not in known.__members__:
        raise FewShotError(f"encoder.weights={weights} is unknown for {name}: choose {', '.join(known.__members__)}")
    return known[weights]


def _behead(network: nn.Module) -> tuple[str, int]:
    """Remove the last linear layer; return its name and number of input features."""
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers or hasattr(network, "aux_logits"):
        raise FewShotError(
            f"encoder.name={type(network).__name__.lower()} does not end in one linear layer, so it has no embedding; "
            "choose a different model"
        )
    name, head = layers[-1]
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return name, head.in_features


def _download(name: str, weights: WeightsEnum, settings: Mapping[str, Any]) -> nn.Module:
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return get_model(name, weights=weights, **settings)
    except OSError as error:
        raise FewShotError(
            f"the weights {weights} are not in {path.parent} and cannot be downloaded from {weights.url}: "
            f"{getattr(error, 'reason', error)}; put {path.name} there, or specify the file with encoder.file=PATH"
        ) from error
    except Exception as error:
        get_model(name, weights=None, **settings)  # fails if the settings are wrong, and not the file
        raise unfit(path, error, "delete it to download it again") from error
