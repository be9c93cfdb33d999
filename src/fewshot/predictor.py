"""Applies a method to images from files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_object
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from fewshot.checks import refuse
from fewshot.config import wrong_settings
from fewshot.data.bank import has_bright_ink, has_photos
from fewshot.data.files import ImageFile
from fewshot.data.images import normalise
from fewshot.data.kinds import Kind
from fewshot.data.photos import CROPS, read_photo
from fewshot.embeddings import EMBEDDED_TOGETHER, EmbeddingCache
from fewshot.encoders.backbone import Backbone
from fewshot.errors import FewShotError
from fewshot.hardware import check_hardware, machine, precision_of
from fewshot.learned import Learned, Pixels
from fewshot.methods.auto import Linear
from fewshot.methods.base import Classifier, FewShotMethod, MetricMethod, require_finite, set_mirror
from fewshot.trained import Trained, load_trained, make_untrained, with_chosen_method


class Predictor:
    """Applies a method to images from files.

    Args:
        method: trained, or a method that needs no training.
        dataset: ``size``, ``channels`` and ``normalise`` of the images that its encoder takes.
        ink: it was trained on bright letters on black, see ``read_photo``.
        hardware: the group of that name; one device is used.
        crop: what becomes of images that are not square, see ``fewshot.data.photos.prepare``.
        photos: it was trained on photos.

    Raises:
        FewShotError: ``hardware`` requests more than one device, or ``crop`` is unknown.
    """

    def __init__(
        self,
        method: FewShotMethod,
        dataset: DictConfig,
        ink: bool,
        hardware: DictConfig,
        crop: str = "auto",
        photos: bool = False,
    ) -> None:
        if crop not in CROPS:
            raise FewShotError(f"crop={crop} is unknown: choose {', '.join(CROPS)}")
        if hardware.devices not in (1, "auto"):
            raise FewShotError(f"hardware.devices={hardware.devices}: predictions are made on one, hardware.devices=1")
        self.size, self.channels, self.kind, self.ink = dataset.size, dataset.channels, dataset.normalise, ink
        self.crop = ("pad" if ink else "center") if crop == "auto" else crop
        check_hardware(hardware)
        precision: Any = precision_of(hardware)
        self._fabric = Fabric(accelerator=hardware.accelerator, devices=1, precision=precision)
        require_finite(method, "the network")
        method.before_prediction()
        self.method = method.eval().to(self._fabric.device)
        self._photos = photos
        if precision.startswith("64"):
            self.method.double()
        self._precision: str = precision
        self._cache: EmbeddingCache | None = None

    def keep_embeddings(self, folder: Path, described: Any) -> None:
        """Keep the embeddings of examples in a folder, for the next predictor with the same network.

        Args:
            folder: safe to empty at any time.
            described: what decides an embedding apart from the weights and what this class knows.
        """
        known = {
            "described": described,
            "images": (self.size, self.channels, self.kind),
            "precision": self._precision,
            "machine": machine(self._fabric.device),
            "torch": torch.__version__,
        }
        self._cache = EmbeddingCache(folder, known)

    @property
    def knows(self) -> Kind | None:
        """What its network was trained on; None: data of a user's own, of either kind."""
        if self.ink:
            return "letters"
        encoder = getattr(self.method, "encoder", None)
        return "photos" if self._photos or (isinstance(encoder, Backbone) and encoder.frozen) else None

    def read(self, file: ImageFile) -> Pixels:
        """Read an image as the network sees it: uint8 ``[size, size, channels]``; see ``read_photo``."""
        return read_photo(file, self.size, self.channels, self.ink, self.crop, reduced=True)

    def learn(self, support: Mapping[str, Sequence[Pixels]]) -> Learned:
        """Learn classes from examples.

        Args:
            support: the images of each class, by its name, as returned by ``read``; at least one per class.

        Raises:
            FewShotError: there are fewer than two classes, or one is empty.
        """
        if len(support) < 2 or not all(support.values()):
            raise FewShotError("a support set needs at least two classes, and at least one image of each")
        labels = torch.arange(len(support)).repeat_interleave(
            torch.tensor([len(examples) for examples in support.values()])
        )
        images = [image for examples in support.values() for image in examples]
        return self.learn_examples(tuple(support), self.represent_examples(images), labels)

    def learn_examples(
        self, classes: tuple[Any, ...], examples: torch.Tensor, labels: torch.Tensor, fitted: Linear | None = None
    ) -> Learned:
        """Learn classes from what ``represent`` returns.

        Args:
            classes: see ``Learned``, as for the next two.
            examples: on any device.
            labels: on the CPU.
            fitted: a classifier that was learned from them before.
        """
        examples = examples.to(self._fabric.device) if isinstance(self.method, MetricMethod) else examples
        # Full context embeddings read the support set as a sequence, and were trained on shuffled ones.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        classify = (
            fitted.to(self._fabric.device)
            if fitted is not None
            else self._learn(examples[order], labels[order], len(classes))
        )
        if isinstance(classify, Linear) and classify.held_out is not None:
            in_order = replace(classify.held_out, index=order[classify.held_out.index], labels=labels)
            classify = replace(classify, held_out=in_order)
        alone = isinstance(self.method, MetricMethod) and not self.method.transductive
        return Learned(classes, examples, labels, self.represent, classify, self._learn if alone else None)

    def represent(self, images: Sequence[Pixels]) -> torch.Tensor:
        """Embed images if the method compares embeddings, ``[images, ...]``; else return them, uint8, on the CPU."""
        pixels = torch.from_numpy(np.stack(images))
        if not isinstance(self.method, MetricMethod):
            return pixels
        with torch.no_grad(), self._fabric.autocast():
            return torch.cat([self.method.represent(self._input(part)) for part in pixels.split(EMBEDDED_TOGETHER)])

    def represent_examples(self, images: Sequence[Pixels]) -> torch.Tensor:
        """Return the same as ``represent``; embeddings that are in the cache are not computed again."""
        if self._cache is None or not isinstance(self.method, MetricMethod):
            return self.represent(images)
        pixels = torch.from_numpy(np.stack(images))
        return self._cache.each(self.method, pixels, lambda new: self.represent(list(new.numpy())))

    def _learn(self, examples: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        labels, method = labels.to(self._fabric.device), self.method
        with torch.no_grad(), self._fabric.autocast():
            if not isinstance(method, MetricMethod):
                adapted = method.classifier(self._input(examples), labels, way)
                return self._without_gradients(lambda images: adapted(self._input(images)))
            learned = method.learn(examples, labels, way)
            return learned if isinstance(learned, Linear) else self._without_gradients(learned)

    def _without_gradients(self, classify: Classifier) -> Classifier:
        def answer(queries: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self._fabric.autocast():
                return classify(queries)

        return answer

    def _input(self, pixels: torch.Tensor) -> torch.Tensor:
        return normalise(pixels.to(self._fabric.device), self.kind).to(self.method.dtype)


def arbitrary_alone(method: FewShotMethod) -> str:
    """Say what a single query means to a transductive method."""
    return (
        f"{type(method).__name__} is transductive: it compares queries with each other, so the answer to a single one "
        "can be arbitrary; classify more together, or choose a method such as method=protonet"
    )


def make_predictor(config: DictConfig) -> Predictor:
    """Make the predictor that ``conf/predict.yaml`` describes, from a checkpoint or a method that needs no training.

    Raises:
        FewShotError: see ``make_trained``.
    """
    return predictor_of(make_trained(config), config.hardware, config.crop, config.get("cache_dir"))


def predictor_of(trained: Trained, hardware: DictConfig, crop: str, cache_dir: str | None = None) -> Predictor:
    """Make the predictor of a method; see ``Predictor``. ``cache_dir`` keeps the embeddings of examples."""
    set_mirror(trained.method, trained.config.get("mirror"))
    data_set = get_object(trained.config.dataset.source._target_)
    ink, photos = has_bright_ink(data_set), has_photos(data_set)
    predictor = Predictor(trained.method, trained.config.dataset, ink, hardware, crop, photos)
    if cache_dir is not None:
        folder = Path(cache_dir).expanduser() / "embeddings"
        described = {"method": OmegaConf.to_container(trained.config.method, resolve=True)}
        predictor.keep_embeddings(folder, {**described, "mirror": trained.method.mirror})
    return predictor


def make_trained(config: DictConfig, places: Mapping[str, str] | None = None) -> Trained:
    """Make the method that ``conf/predict.yaml`` describes.

    Args:
        config: the composed configuration.
        places: see ``load_trained``.

    Raises:
        FewShotError: the checkpoint is broken, or does not go with the chosen method or groups, see
            ``with_chosen_method``; or without a checkpoint, there are untrained weights, or its image format is wrong.
    """
    if config.checkpoint is not None:
        trained = load_trained(config.checkpoint, trust=config.trust, places=places)
        if config.get("mirror") is not None:
            trained.config.mirror = config.mirror
        return with_chosen_method(trained, config.overrides)
    refuse(wrong_settings({"dataset": config.dataset}))
    method = make_untrained(config.method, "this method or its encoder")
    # The images are in folders of any place.
    source = {"_target_": "fewshot.data.folder.folder", "size": config.dataset.size}
    dataset = {**config.dataset, "source": {**source, "channels": config.dataset.channels, "data_dir": ""}}
    node = OmegaConf.to_container(config.method, resolve=True)
    return Trained(None, method, OmegaConf.create({"method": node, "dataset": dataset, "mirror": config.mirror}), {})
