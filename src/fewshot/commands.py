"""The commands: ``fewshot NAME KEY=VALUE ...``, or in a checkout ``python src/NAME.py KEY=VALUE ...``.

Commands import what they need when they run, so that help, completion and errors need neither PyTorch nor Lightning.
"""

import sys
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from fewshot.checks import Count, Place, Positive, Several, misfits, refuse
from fewshot.config import CHECKOUT, ROOT, wrong_settings
from fewshot.errors import FewShotError
from fewshot.processes import rank
from fewshot.text import say


def train(config: DictConfig) -> float | None:
    """Train a few-shot method, choose its weights on validation classes, and test them once."""
    if config.run_dir is not None and rank() == 0:
        say(f"run directory: {config.run_dir}")  # before the slow import
    from fewshot.training import train

    return train(config)


def evaluate(config: DictConfig) -> float:
    """Test the weights of a checkpoint at any way and shot, per class, alone or against others."""
    from fewshot.evaluation import evaluate

    return evaluate(config)


def predict(config: DictConfig) -> None:
    """Classify your own images from a few examples of each class."""
    from fewshot.prediction import predict

    predict(config)


def teach(config: DictConfig) -> None:
    """Learn classes from photos once, and write what was learned to one file."""
    from fewshot.teaching import teach

    teach(config)


def report(config: DictConfig) -> None:
    """Compare the results of runs with published ones."""
    from fewshot.report import report

    refuse(misfits(config, {"runs": str | Several, "out": Place, "readme": Place | None}))
    for path in report(config.runs, config.tables, config.sources, config.out, config.readme):
        say(path)


def compare(config: DictConfig) -> None:
    """Compare runs and sweeps with each other, in a table and a figure."""
    from fewshot.compare import compare

    refuse(misfits(config, {"runs": str | Several, "reference": Place | None, "out": Place}))
    compare(config.runs, config.reference, config.out)


def figure(config: DictConfig) -> None:
    """Draw one of the project's figures."""
    _only_in_a_checkout("figure")
    refuse([*misfits(config, {"out": Place}), *wrong_settings({"figure": config.figure})])
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for path in instantiate(config.figure, out=out):
        say(path)


def export(config: DictConfig) -> None:
    """Write an encoder or a taught classifier as ONNX, for other programs."""
    from fewshot.export import export, export_classifier

    refuse(misfits(config, {"checkpoint": Place | None, "model": Place | None, "out": Place}))
    if config.model is not None and config.checkpoint is not None:
        raise FewShotError(f"checkpoint={config.checkpoint}: model={config.model} decides that; remove one of them")
    if config.model is not None:
        export_classifier(config.model, config.out, config.trust)
    else:
        export(config.checkpoint, config.out, config.trust)


def models(config: DictConfig) -> None:
    """List the trained models that come with the package, or print their cards."""
    refuse(misfits(config, {"names": list[str], "cards": bool}))
    if config.cards:
        from fewshot.cards import write_cards

        for path in write_cards(config.licences):
            say(path)
        return
    from fewshot.models import show

    show(config.names)


def reproduce(config: DictConfig) -> None:
    """Re-measure rows of the tables from their shipped weights."""
    from fewshot.reproduce import reproduce

    reproduce(config)


def demo(config: DictConfig) -> None:
    """Serve a page that classifies images from a few examples of each class, until Ctrl-C."""
    from fewshot.demo import serve

    serve(config)


def bench(config: DictConfig) -> None:
    """Time this project against other implementations."""
    _only_in_a_checkout("bench")
    from benchmarks.contest import bench
    from benchmarks.suite import choose

    refuse(misfits(config, {"only": Several | None, "rounds": Count, "seconds": Positive, "out": Place}))
    bench(
        choose(config.only, config.device), config.rounds, config.seconds, Path(config.out).expanduser(), config.device
    )


COMMANDS = {
    command.__name__: command
    for command in (train, evaluate, predict, teach, report, compare, models, reproduce, figure, export, demo, bench)
}


def _only_in_a_checkout(name: str) -> None:
    """Make ``src`` importable: benchmarks and figures are not part of the installed package.

    Raises:
        FewShotError: there is no ``src``.
    """
    if not CHECKOUT:
        raise FewShotError(
            f"fewshot {name} works only in a checkout of the project: the installed package leaves out its benchmarks "
            "and figures"
        )
    if str(ROOT / "src") not in sys.path:
        sys.path.append(str(ROOT / "src"))
