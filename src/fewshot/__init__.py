"""Learn from a handful of examples: episodic few-shot training on PyTorch Lightning, configured by Hydra.

The public API for programs and notebooks; everything else is in the modules::

    run = fewshot.train(method="protonet", dataset="omniglot", way=5, shot=1)
    method = fewshot.load(run).method
    classifier = fewshot.FewShotClassifier(run).fit(images, labels)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fewshot.config import compose
    from fewshot.data.datamodule import EpisodeDataModule
    from fewshot.estimator import FewShotClassifier
    from fewshot.methods.maml import MAML
    from fewshot.methods.matching import MatchingNetwork
    from fewshot.methods.protonet import PrototypicalNetwork
    from fewshot.trained import load_trained as load
    from fewshot.training import compose_and_train as train

__all__ = [
    "MAML",
    "EpisodeDataModule",
    "FewShotClassifier",
    "MatchingNetwork",
    "PrototypicalNetwork",
    "compose",
    "load",
    "train",
]
_MODULES = {
    "MAML": "methods.maml",
    "EpisodeDataModule": "data.datamodule",
    "FewShotClassifier": "estimator",
    "MatchingNetwork": "methods.matching",
    "PrototypicalNetwork": "methods.protonet",
    "compose": "config",
    "load": "trained",
    "train": "training",
}
_RENAMED = {"load": "load_trained", "train": "compose_and_train"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line's help needs neither PyTorch nor Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fewshot.{_MODULES[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
