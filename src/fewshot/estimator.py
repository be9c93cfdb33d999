"""A few-shot classifier with the scikit-learn interface."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn

from fewshot.checkpoints import NOWHERE, read_weights
from fewshot.checks import Count, misfits, refuse
from fewshot.config import TYPES, compose, options, search_path
from fewshot.data.files import file_at
from fewshot.data.kinds import is_drawn, mismatch
from fewshot.data.photos import CROPS, prepare
from fewshot.digests import digest
from fewshot.errors import FewShotError
from fewshot.learned import Learned, Pixels
from fewshot.methods.auto import Linear
from fewshot.methods.base import FewShotMethod, set_mirror
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.predictor import Predictor, arbitrary_alone, predictor_of
from fewshot.taught import load_taught, save_taught
from fewshot.trained import Trained, load_trained, restore
from fewshot.trust import read_config


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify images from a few labelled examples of each class; ``fit`` takes the examples, and trains nothing else.

    An image is a path, a PIL image, or an array: uint8 ``[height, width]`` or ``[height, width, channels]``. Images may
    differ in size; ``fewshot.data.photos.prepare`` converts them for the model.

    Args:
        model: a run directory or one of its checkpoints; a file written by ``save``; a method; or any encoder, a module
            that maps images ``[images, channels, height, width]`` to embeddings ``[images, features]``, to classify by
            the nearest prototype.
        size: height and width of the images for a method or an encoder; this and the next three arguments are ignored
            for a file, which records them.
        channels: 1 for grey, 3 for RGB images.
        normalise: how to normalise images, see ``fewshot.data.images.normalise``.
        ink: whether the images are letters or drawings, bright on black.
        hardware: an option of the configuration group ``hardware``.
        batch: number of images embedded at once.
        mirror: embed each image and its mirror image, and use the mean: for photos, not letters; None: as the network
            was trained.
        trust: packages whose code the file may name.

    Attributes:
        classes_: the sorted labels, ``[way]``, in the order of ``predict_proba``.
        support_: the examples of ``fit`` as the model sees them, uint8 ``[examples, size, size, channels]``, in the
            order of ``labels_``; a loaded classifier has none.
        labels_: the class of each example, int64 ``[examples]``, as an index into ``classes_``, class by class.
    """

    def __init__(
        self,
        model: str | PathLike[str] | nn.Module,
        *,
        size: int = 224,
        channels: int = 3,
        normalise: str = "standardise",
        ink: bool = False,
        hardware: str = "auto",
        batch: int = 64,
        mirror: bool | None = None,
        trust: str | Iterable[str] | None = None,
    ) -> None:
        self.model = model
        self.size = size
        self.channels = channels
        self.normalise = normalise
        self.ink = ink
        self.hardware = hardware
        self.batch = batch
        self.mirror = mirror
        self.trust = trust

    def fit(self, images: Iterable[Any], labels: ArrayLike) -> "FewShotClassifier":
        """Learn the classes from examples, and forget those of earlier calls.

        Args:
            images: at least one image of each class.
            labels: the class of each image, strings or numbers.

        Raises:
            FewShotError: the model does not exist; ``size``, ``channels`` or ``normalise`` is wrong; an image cannot be
                read; images and labels differ in number; or there are fewer than two classes.
        """
        predictor = self._make_predictor()
        support = [_prepare(image, predictor) for image in _several(images)]
        names = np.asarray(labels)
        if names.shape != (len(support),):
            raise FewShotError(f"labels have shape {list(names.shape)} for {len(support)} images; give one label each")
        try:
            if len({isinstance(label, str) for label in labels}) > 1:  # type: ignore[union-attr]
                raise TypeError("an array makes all of them strings")
            classes, numbers = np.unique(names, return_inverse=True)
        except TypeError as error:  # they cannot be sorted
            raise FewShotError("labels are of different kinds; give only strings, or only numbers") from error
        missing = np.flatnonzero(names != names)  # noqa: PLR0124  # NaN and NaT, of any kind
        if len(missing):
            raise FewShotError(f"the label of image {missing[0]} is missing ({names[missing[0]]})")
        # Class by class, as from folders.
        grouped = np.argsort(numbers, kind="stable")
        if len(classes) < 2:
            raise FewShotError("a support set needs at least two classes, and at least one image of each")
        _warn(predictor, [is_drawn(pixels) for pixels in support], "examples")
        label_of: dict[bytes, int] = {}
        for number, pixels in zip(numbers.tolist(), support, strict=True):
            other = label_of.setdefault(pixels.tobytes(), number)
            if other != number:
                warnings.warn(
                    f"the same image is in the classes {classes[other]} and {classes[number]}, so they cannot be "
                    "distinguished",
                    stacklevel=2,
                )
        support = [support[number] for number in grouped]
        examples = predictor.represent(support)
        learned = predictor.learn_examples(tuple(classes.tolist()), examples, torch.from_numpy(numbers[grouped]))
        self.support_ = np.array(support)
        return self._keep(predictor, learned)

    def decision_function(self, images: Iterable[Any]) -> NDArray[np.float32]:
        """Return logits ``[images, way]``; of two classes, how much larger that of the second one is, ``[images]``.

        Raises:
            FewShotError: an image cannot be read.
            sklearn.exceptions.NotFittedError: ``fit`` has not been called.
        """
        logits = self._logits(images)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _logits(self, images: Iterable[Any]) -> NDArray[np.float32]:
        check_is_fitted(self, "classes_")
        logits = [np.empty((0, len(self.classes_)), np.float32)]
        batch: list[Pixels] = []
        drawn: list[bool] = []
        for image in _several(images):
            batch.append(_prepare(image, self._predictor))
            drawn.append(is_drawn(batch[-1]))
            if len(batch) == self.batch and not self._predictor.method.needs_all_queries:
                logits.append(self._learned(batch).numpy())
                batch = []
        _warn(self._predictor, drawn, "queries")
        if len(drawn) == 1 and self._predictor.method.needs_all_queries:
            warnings.warn(arbitrary_alone(self._predictor.method), stacklevel=2)
        return np.concatenate([*logits, self._learned(batch).numpy()] if batch else logits)

    def predict_proba(self, images: Iterable[Any]) -> NDArray[np.float32]:
        """Return class probabilities, the softmax of the logits, ``[images, way]``."""
        return torch.from_numpy(self._logits(images)).softmax(dim=1).numpy()

    def predict(self, images: Iterable[Any]) -> NDArray[Any]:
        """Return the most probable label of each image."""
        best = self._logits(images).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the classifier to one safetensors file, see ``fewshot.taught``: no code, and no photos but for MAML.

        Raises:
            FewShotError: it was made from a method or an encoder, which has no configuration.
            sklearn.exceptions.NotFittedError: ``fit`` has not been called.
        """
        check_is_fitted(self, "classes_")
        if isinstance(self.model, nn.Module):
            raise FewShotError(
                "a classifier made from a module cannot be saved, because the file needs the configuration of a run: "
                "make it from one, FewShotClassifier(RUN_DIR)"
            )
        _, config, _ = self._open(places=NOWHERE)
        save_taught(Path(path), self._predictor, self._learned, config)

    @classmethod
    def load(cls, path: str | PathLike[str], **settings: Any) -> "FewShotClassifier":
        """Load a classifier written by ``save``. The file may be untrusted: no code in it is run.

        Args:
            path: path of the file.
            settings: ``hardware``, ``batch`` and ``trust``, see the class.

        Raises:
            FewShotError: it is broken or not a saved classifier, or names code that is not trusted.
        """
        loaded = cls(path, **settings)
        taught = load_taught(Path(path), _hardware(loaded.hardware), loaded.trust)
        return loaded._keep(taught.predictor, taught.learned)

    def _keep(self, predictor: Predictor, learned: Learned) -> "FewShotClassifier":
        self._predictor, self._learned = predictor, learned
        self.classes_, self.labels_ = np.array(learned.classes), learned.labels.numpy()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what was learned without the network, which ``model`` names or is."""
        state = dict(super().__getstate__())
        learned: Learned | None = state.pop("_learned", None)
        predictor: Predictor | None = state.pop("_predictor", None)
        if learned is not None and predictor is not None:
            fitted = learned.classify if isinstance(learned.classify, Linear) else None
            state["_taught"] = (
                digest(predictor.method.encoder.state_dict()),
                (learned.classes, learned.examples.cpu(), learned.labels),
                None if fitted is None else fitted.to(torch.device("cpu")),
            )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the network again.

        Raises:
            FewShotError: it is not there, or its weights differ from those it was fitted with.
        """
        taught = state.pop("_taught", None)
        super().__setstate__(state)
        if taught is not None:
            predictor = self._make_predictor()
            if digest(predictor.method.encoder.state_dict()) != taught[0]:
                raise FewShotError(f"{self.model}: its weights differ from those it was fitted with; fit it again")
            classes, examples, labels = taught[1]
            self._keep(predictor, predictor.learn_examples(classes, examples, labels, taught[2]))

    def _make_predictor(self) -> Predictor:
        refuse(misfits({"batch": self.batch, "mirror": self.mirror}, {"batch": Count, "mirror": bool | None}))
        hardware = _hardware(self.hardware)
        if isinstance(self.model, nn.Module):
            method = self.model if isinstance(self.model, FewShotMethod) else PrototypicalNetwork(self.model)
            dataset = {"size": self.size, "channels": self.channels, "normalise": self.normalise}
            refuse(misfits(dataset, {key: TYPES[f"dataset.{key}"] for key in dataset}))
            if self.mirror is not None:
                set_mirror(method, self.mirror)
            return Predictor(method, OmegaConf.create(dataset), self.ink, hardware)
        method, config, crop = self._open()
        return predictor_of(Trained(None, method, OmegaConf.create(config), {}), hardware, crop)

    def _open(self, places: dict[str, str] | None = None) -> tuple[FewShotMethod, dict[str, Any], str]:
        """Load the method in a file, the configuration of its run, and what becomes of images that are not square."""
        assert not isinstance(self.model, nn.Module)
        path = Path(self.model).expanduser()
        if not path.is_file() or path.suffix == ".ckpt":
            trained = load_trained(str(path), trust=self.trust, places=places)
            return trained.method, self._chosen(trained.checkpoint["hyper_parameters"]), "auto"
        content, weights, _ = read_weights(path)
        try:
            config = read_config(content.get("config"), path, trust=self.trust, places=places)
        except ValueError as error:
            raise FewShotError(f"{path} is broken: {error}; save the classifier again") from error
        crop = content.get("crop", "auto")
        if crop not in CROPS:
            raise FewShotError(f"{path} is broken: its crop is {crop!r}; save the classifier again")
        return restore(path, config, weights), self._chosen(config), crop

    def _chosen(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a run with what this classifier changes."""
        return {**config, **({} if self.mirror is None else {"mirror": self.mirror})}


def _hardware(option: str) -> DictConfig:
    known = {name for source in search_path() for name in options(source, "hardware")}
    if option not in known:
        raise FewShotError(f"hardware={option} is not an option; choose {', '.join(sorted(known))}")
    hardware: DictConfig = compose(f"hardware={option}", name="predict").hardware
    return hardware


def _several(images: Iterable[Any]) -> Iterable[Any]:
    one = isinstance(images, np.ndarray) and (images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)))
    if one or isinstance(images, str | PathLike | Image.Image):
        raise FewShotError("images is a single image; give a list of them: [image]")
    if isinstance(images, Mapping) or hasattr(images, "columns"):
        raise FewShotError('images is a table; give one column of it: table["path"]')
    return images


def _warn(predictor: Predictor, drawn: Sequence[bool], name: str) -> None:
    line = mismatch(predictor.knows, drawn, name)
    if line is not None:
        warnings.warn(line, stacklevel=3)


def _prepare(image: Any, predictor: Predictor) -> Pixels:
    if isinstance(image, str | PathLike):
        return predictor.read(file_at(Path(image).expanduser()))
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
            raise FewShotError(
                f"an image is an array of {pixels.dtype} {list(pixels.shape)}; give uint8 [height, width] or "
                "[height, width, channels] with 1, 3 or 4 channels, a PIL image, or a path"
            )
        if not pixels.size:
            raise FewShotError(f"an image has no pixels: {list(pixels.shape)}")
        image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    try:
        return prepare(image, predictor.size, predictor.channels, predictor.ink, predictor.crop)
    except ValueError as error:
        raise FewShotError(f"an image cannot be used: {error}; remove it") from error
