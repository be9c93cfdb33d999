"""Networks from timm (PyTorch Image Models), with its weights, weights from a file, or random weights."""

import difflib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from fewshot.encoders.backbone import Backbone, load_weights
from fewshot.errors import FewShotError, reason
from fewshot.paths import install

OURS = frozenset({"num_classes", "features_only"})  # arguments of timm's models that this encoder sets
# Arguments that point to weights or settings elsewhere; this encoder has its own keys for files and downloads.
PLACES = frozenset({"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})
MAX_SETTING = 10_000  # limit for numbers in a model's settings: an untrusted checkpoint must not exhaust the memory


class TimmEncoder(Backbone):
    """A timm model without its classifier; see ``Backbone``.

    Args:
        name: of the model, with the tag of its weights if there are several: "vit_small_patch14_dinov2.lvd142m".
        pretrained: use timm's weights, downloaded if missing; False: random weights.
        file: load weights of the same model from this file instead, see ``load_weights``.
        rename: renames the weights in the file, see ``load_weights``.
        frozen: keep the weights and batch norm statistics unchanged.
        size: height and width that images are resized to; None: the size its weights were trained on.
        settings: further arguments of the model: ``drop_path_rate``, ``in_chans``, ``img_size``, ...

    Raises:
        FewShotError: timm is not installed; the model or a setting is unknown; or the weights cannot be downloaded or
            do not fit.
    """

    WITHOUT_WEIGHTS: ClassVar[Mapping[str, Any]] = {"pretrained": False, "file": None}

    def __init__(
        self,
        name: str = "resnet18",
        pretrained: bool = True,
        file: str | None = None,
        rename: Mapping[str, str] | None = None,
        frozen: bool = True,
        size: int | None = None,
        **settings: Any,
    ) -> None:
        try:
            import timm  # noqa: PLC0415
        except ImportError as error:
            raise FewShotError(
                f"encoder=timm needs timm, which is not installed; install the extra: {install('timm')}"
            ) from error
        _check(timm, name, settings, size)
        network = _make(timm, name, pretrained and file is None, settings)
        info: Any = network.pretrained_cfg
        if file is not None:
            classifiers = info["classifier"] or ()
            load_weights(network, file, rename, [classifiers] if isinstance(classifiers, str) else classifiers)
        side = size or settings.get("img_size") or info["input_size"][-1]
        channels = int(settings.get("in_chans", 3))
        mean, std = ([*info[key]] if channels == 3 else [sum(info[key]) / 3] * channels for key in ("mean", "std"))
        features = getattr(network, "head_hidden_size", None) or network.num_features
        super().__init__(network, int(features), int(side), mean, std, frozen)  # type: ignore[arg-type]

    def feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        """See ``Backbone``; a transformer's tokens are arranged like their patches."""
        network: Any = self.network
        prepared = self.prepare(images)
        maps: torch.Tensor = network.forward_features(prepared)
        if maps.ndim == 4:
            return maps.movedim(-1, 1) if getattr(network, "output_fmt", "NCHW") == "NHWC" else maps
        if not hasattr(network, "forward_intermediates"):
            raise FewShotError(
                f"the encoder {type(network).__name__} of timm has no feature maps; choose a different one, such as "
                "encoder.name=resnet18"
            )
        last: torch.Tensor
        (last,) = network.forward_intermediates(prepared, indices=1, norm=True, intermediates_only=True)
        return last


def _check(timm: Any, name: str, settings: Mapping[str, Any], size: int | None) -> None:
    if not timm.is_model(name):  # also rejects hub addresses: only models defined in timm are allowed
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise FewShotError(f"encoder.name={name} is not a timm model; {hint}")
    for key in settings:
        if key in PLACES:
            raise FewShotError(f"encoder.{key} cannot be set; specify a file with weights with encoder.file=PATH")
        if key in OURS:
            raise FewShotError(f"encoder.{key} cannot be set: an encoder ends with its embedding; leave it out")
    for key, value in _numbers({**settings, "size": size}):
        if abs(value) > MAX_SETTING:
            raise FewShotError(f"encoder.{key}={value} must be at most {MAX_SETTING:,}")


def _numbers(settings: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(settings, int | float):
        yield key, settings
    elif isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _numbers(value, f"{key}.{name}".lstrip("."))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _numbers(value, key)


def _make(timm: Any, name: str, download: bool, settings: Mapping[str, Any]) -> torch.nn.Module:
    tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    try:
        info = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise FewShotError(
            f"encoder.name={name}: timm has no weights with this name; choose one of {', '.join(tagged)}"
        ) from error
    if download and (info is None or not info.has_weights):
        raise FewShotError(
            f"encoder.name={name} has no weights in timm; choose a different name, or set encoder.pretrained=false"
        )
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about each retry
    try:
        network: torch.nn.Module = timm.create_model(name, pretrained=download, num_classes=0, **settings)
    except OSError as error:
        raise FewShotError(
            f"the weights of encoder.name={name} cannot be downloaded from huggingface.co/{info.hf_hub_id}: "
            f"{reason(error)}; fetch model.safetensors from there, and specify it with encoder.file=PATH"
        ) from error
    except Exception as error:  # each model rejects settings in its own way
        raise FewShotError(f"encoder.name={name} rejects its settings: {reason(error)}; correct them") from error
    finally:
        logger.setLevel(level)
    return network
