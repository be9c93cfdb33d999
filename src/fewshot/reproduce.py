"""Re-measure rows of the tables: the shipped weights on the same test episodes, or a training from scratch."""

import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from fewshot.checks import Place, Several, misfits, refuse
from fewshot.config import as_overrides, check, compose
from fewshot.data.contents import contents_of, differences
from fewshot.errors import FewShotError, mistake
from fewshot.evaluation import TASK, Evaluation, evaluate_split, open_split, task_of
from fewshot.hardware import check_hardware, keep_freed_memory, precision_like, report_out_of_memory
from fewshot.metrics import Estimate, paired_difference
from fewshot.models import CARD, Model, bare_cells, names, require
from fewshot.results import read_episodes
from fewshot.runs import data_directories, trained_on
from fewshot.text import say
from fewshot.trained import load_trained
from fewshot.training import train

TYPES: dict[str, Any] = {"rows": str | Several, "episodes": Annotated[int, Ge(2)] | None, "train": bool}
TYPES |= dict.fromkeys(("data_dir", "cache_dir", "out"), Place)
EQUAL, WITHIN, DIFFERS = "equal", "within", "differs"
SIGNIFICANT = 0.05  # p-value below which two trainings differ


@dataclass(frozen=True)
class Reproduction:
    """A row of the tables, measured again.

    Attributes:
        before: its accuracy on these episodes as the table has it, or that of its weights if they were trained again.
        now: the accuracy measured now.
        verdict: ``EQUAL``, ``WITHIN`` or ``DIFFERS``, and why.
        seconds: how long it took.
    """

    before: float
    now: Estimate
    verdict: str
    seconds: float


def reproduce(config: DictConfig) -> None:
    """Re-measure rows, and print each as it ends.

    Args:
        config: the composed ``conf/reproduce.yaml``.

    Raises:
        FewShotError: a row is unknown, has no weights, could not be measured, or differs.
    """
    refuse(misfits(config, TYPES))
    chosen = [config.rows] if isinstance(config.rows, str) else list(config.rows)
    models = {str(name): require(str(name)) for name in (names() if chosen == ["all"] else chosen)}
    check_hardware(config.hardware)
    keep_freed_memory()
    failed: dict[str, str] = {}
    width = max(map(len, models))
    say(f"{'row':<{width}}  table, %    now, %  seconds  verdict")
    for name, model in models.items():
        try:
            with report_out_of_memory("choose hardware=cpu"):
                one = train_again(model, config) if config.train else measure(model, config)
        except Exception as error:
            ours = mistake(error)  # Hydra wraps those in a data set
            if ours is None:
                raise
            failed[name] = f": {ours}"
            say(f"{name:<{width}}  not measured, see below")
            continue
        before, now = 100 * one.before, 100 * one.now.accuracy
        say(f"{name:<{width}}  {before:8.4f}  {now:8.4f}  {one.seconds:7.0f}  {one.verdict}")
        if one.verdict.startswith(DIFFERS):
            failed[name] = f" {one.verdict}"
    bare = bare_cells()
    if bare and chosen == ["all"]:
        say(f"no weights, so not measured: {', '.join(bare)}")
    if failed:
        lines = "\n".join(f"{name}{why}" for name, why in failed.items()).split("\n")
        raise FewShotError(f"{len(failed)} of {len(models)} rows were not reproduced", *lines)


def measure(model: Model, config: DictConfig) -> Reproduction:
    """Test the weights of a row on its own test episodes, or the first of them.

    Args:
        model: the row.
        config: see ``reproduce``.

    Raises:
        FewShotError: the weights, their configuration or the data have changed, or the data are missing.
    """
    start = time.monotonic()
    model.check()
    tested = _test(model, str(model.weights), config)
    before = _recorded(model, len(tested.correct))
    now = tested.estimate
    difference = now.accuracy - before
    same = math.isclose(difference, 0, abs_tol=1e-9)
    verdict = EQUAL if same else WITHIN if abs(difference) <= now.ci95 else DIFFERS
    if not same:
        queries = len(tested.correct) * _queries(model)
        changed = f"{abs(difference) * queries:,.1f}".removesuffix(".0")  # with ties
        more = "more" if difference > 0 else "fewer"
        verdict = f"{verdict}: {changed} {more} of {queries:,} queries are right, the interval is ±{100 * now.ci95:.4f}"
        computed, table = str(tested.trainer.precision), model.card["precision"]
        if computed != table:
            verdict += f"; computed in {computed}, the table in {table}"
    return Reproduction(before, now, verdict, time.monotonic() - start)


def train_again(model: Model, config: DictConfig) -> Reproduction:
    """Train a row from scratch with its own command, and compare with its weights on the same test episodes.

    Args:
        model: the row.
        config: see ``reproduce``; the run is below ``out``, and is resumed if it is there.

    Raises:
        FewShotError: see ``measure``.
    """
    start = time.monotonic()
    model.check()
    card, folder = model.card, Path(config.out).expanduser() / model.card["weights"]
    machine = (card["machine"] or {}).get("processor", "an unknown machine")
    say(f"{model.name}: {card['command']}", f"expect {card['hours']:.2f} hours; that is what it took on {machine}")
    hardware = {key: value for key, value in config.hardware.items() if value is not None}
    settings = {"run_dir": str(folder), "resume": "auto", "hardware": hardware, **data_directories(config)}
    train(compose(*shlex.split(card["command"])[2:], *as_overrides(settings)))
    theirs, ours = (_test(model, place, config) for place in (str(model.weights), str(folder)))
    difference = paired_difference(ours.correct, theirs.correct, _queries(model))
    p = p_value(difference)
    same = np.array_equal(ours.correct, theirs.correct)
    verdict = EQUAL if same else WITHIN if p >= SIGNIFICANT else DIFFERS
    if not same:
        verdict = f"{verdict}: {100 * difference.accuracy:+.2f} ± {100 * difference.ci95:.2f}, p = {p:.3f}"
    return Reproduction(theirs.estimate.accuracy, ours.estimate, verdict, time.monotonic() - start)


def p_value(difference: Estimate) -> float:
    """Return the two-sided p-value of a difference, by a normal test.

    The test is over episodes: it does not know how much trainings with other seeds differ.
    """
    if difference.accuracy == 0:
        return 1.0
    deviation = difference.ci95 / 1.96
    return math.erfc(abs(difference.accuracy) / deviation / math.sqrt(2)) if deviation > 0 else 0.0


def _test(model: Model, place: str, config: DictConfig) -> Evaluation:
    """Test a checkpoint on the episodes of a row."""
    trained = load_trained(place, places=data_directories(config))
    test = model.card["test"]
    settings = {key: test.get(key) for key in TASK}
    precision = config.hardware.precision or precision_like(model.card["precision"], config.hardware)
    hardware = OmegaConf.merge(config.hardware, {"precision": precision})
    episodes = min(test["episodes"], config.episodes or test["episodes"])
    settings |= {"episodes": episodes, "hardware": hardware, "cache_dir": config.cache_dir, "out": None}
    task = task_of(trained.config, OmegaConf.create(settings))
    check(task)
    data = open_split(task, "test")
    then = trained_on(trained.checkpoint, None)
    changes = [] if then is None else differences(then, contents_of(data.bank))
    if changes:
        raise FewShotError(
            f"the data differ from those of the table: {'; '.join(changes)}; name the directory of the same data with "
            "data_dir=PATH"
        )
    return evaluate_split(trained, task, data)


def _recorded(model: Model, episodes: int) -> float:
    """Return the accuracy that a row had in its first test episodes."""
    test = model.card["test"]
    correct: NDArray[np.float64] | None = read_episodes(model.folder / CARD, test)
    if correct is None or episodes == test["episodes"]:
        return float(test["accuracy"])
    return float(correct[:episodes].mean() / _queries(model))


def _queries(model: Model) -> int:
    return int(model.card["test"]["way"] * model.card["test"]["query"])
