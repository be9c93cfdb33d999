"""Results of trainings and evaluations: find them, check them, and group them by settings."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot.errors import FewShotError, reason
from fewshot.files import read_json, read_text, write_atomically
from fewshot.text import say

if TYPE_CHECKING:  # the command line imports this file
    import numpy as np
    from numpy.typing import NDArray

Result = Mapping[str, Any]  # contents of a results.json, as written by fewshot.training
Settings = dict[str, Any]  # dotted keys and their values

EPISODES, EPISODES_HEADER = "episodes.csv", "right"  # a file next to the results, and its first line

REQUIRED = {
    "dataset": str,
    "method": str,
    "way": int,
    "shot": int,
    "accuracy": float,
    "ci95": float,
    "episodes": int,
    "seed": int,
    "validations": list,
    "overrides": list,
    "config": dict,
}
# Keys that may be missing or null: not every version, method and program writes all of them.
OPTIONAL = {
    "train_seconds": float,  # only evaluations may lack it
    "test_seconds_per_episode": float,
    "transductive": bool,
    "assumes_balance": bool,
    "concentration": float,
    "trained_on": str,
    "experiment": str,
    "budget": str,
    "distance": str,
    "encoder": str,
    "query": int,
    "machine": dict,
    "meta_batch": int,
    "batch_parts": int,
    "data": dict,
    "precision": str,
    "precisions": list,
    "encoder_parameters": int,
    "encoder_init": dict,
    "split": str,
    "weights": str,
    "run_config": dict,
}
SPLITS = ("train", "val", "test")
# Configuration keys that do not affect accuracy: paths, hardware (a GPU counts, by its name; differences between
# processors and numbers of threads do not), logging, and names that other keys spell out. All other keys count.
NOT_DECISIVE = (
    "seed",  # runs of one line differ in it
    "test",  # the result itself records it, like the task
    "choices",
    "distance",  # repeated in method, if the method has one
    "encoder",  # repeated in method
    "hardware",  # except the precision and the GPU, which the result records
    "data_dir",
    "dataset.source.data_dir",
    "cache_dir",
    "run_dir",
    "name",
    "resume",
    "trust",
    "checkpoint_every",
    "log_every",
    "logger",
    "pictures",
    "method.task_batching",
    "method.vmap_tasks",
    "method.recompute",
)


def read_results(runs: str | Sequence[str], *, known_data: bool = False) -> list[Result]:
    """Read every ``results.json`` below some directories; report and skip those that are broken or of other programs.

    Evaluations of weights other than the best, or on classes other than the test's, are skipped, too: they must not
    count as the test of a run.

    Args:
        runs: directories, or ``results.json`` files; a file found twice counts once.
        known_data: also report and skip results that do not record the data they were measured on.

    Returns:
        The results, in the order of ``runs`` and of the paths below each.

    Raises:
        FewShotError: there are no results.
    """
    return list(read_runs(runs, known_data=known_data).values())


def read_runs(runs: str | Sequence[str], *, known_data: bool = False, evaluations: bool = False) -> dict[Path, Result]:
    """Read results like ``read_results``, by the path of their file.

    Args:
        runs: see ``read_results``.
        known_data: see ``read_results``.
        evaluations: read every evaluation on test classes, whatever its weights, method and data.
    """
    paths = [Path(run).expanduser() for run in ([runs] if isinstance(runs, str) else runs)]
    found = find_results(paths)
    below = ", ".join(map(str, paths))
    if not found:
        raise FewShotError(
            f"no results.json of a run below {below}; train first, or specify the directory with runs=PATH"
        )
    reasons = {path: _not_counted(result, known_data, evaluations) for path, result in found.items()}
    for path, why in reasons.items():
        if why:
            _skip(path, why)
    found = {path: result for path, result in found.items() if not reasons[path]}
    if not found:
        raise FewShotError(
            f"none of the {len(reasons)} results below {below} can be reported, see the lines above; train again, or "
            "specify a different directory with runs=PATH"
        )
    return found


def find_results(paths: Sequence[Path]) -> dict[Path, Result]:
    """Read every valid ``results.json`` at or below some paths, by the path of its file; there may be none."""
    found: dict[Path, Result] = {}
    for root in paths:
        if not root.exists():
            _skip(root, "no such file or directory")
        for path in [root] if root.is_file() else sorted(root.rglob("results.json"), key=natural):
            try:
                result = read_json(path)
            except OSError as error:
                _skip(path, str(error.strerror))
            except ValueError as error:
                _skip(path, f"it is broken: {error}")
            else:
                why = wrong(result)
                if why:
                    _skip(path, f"it is not the result of a run: {why}")
                else:
                    found[path.resolve()] = _corrected(result)
    return found


def _corrected(result: Result) -> Result:
    """Say that MAML is transductive: earlier versions did not, but its batch norm has the statistics of the queries."""
    by_batch_norm = result["method"] == "maml" and result.get("encoder") in ("conv4", "resnet12")
    return {**result, "transductive": True} if by_batch_norm else result


def natural(path: Path) -> list[tuple[str, int]]:
    """Sort key that orders 10 after 2."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def write_episodes(path: Path, correct: "NDArray[np.float64]") -> None:
    """Write the number of correct predictions in each test episode, one line per episode, next to a ``results.json``.

    Args:
        path: the path of the results.
        correct: number of correct predictions per episode, float64 ``[episodes]``; fractions where classes tied.
    """
    lines = [EPISODES_HEADER, *(f"{number:.9g}" for number in correct)]
    write_atomically(path.with_name(EPISODES), "\n".join([*lines, ""]).encode())


def read_episodes(path: Path, result: Result) -> "NDArray[np.float64] | None":
    """Read the number of correct predictions in each test episode, float64 ``[episodes]``.

    Args:
        path: the path of the results.
        result: the results.

    Returns:
        None if the file is missing, broken or does not give the accuracy in the results, which is reported unless the
        file is missing.
    """
    import numpy as np  # noqa: PLC0415

    file = path.with_name(EPISODES)
    try:
        header, *lines = read_text(file).splitlines()
        correct = np.array([float(line) for line in lines])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _skip(file, f"it is broken: {reason(error)}")
        return None
    queries = result["way"] * (result.get("query") or 0)
    whole = header == EPISODES_HEADER and len(correct) == result["episodes"] and queries > 0
    if not whole or not abs(correct.mean() / queries - result["accuracy"]) < 1e-6:  # also if it is not a number
        _skip(file, "it does not belong to the results next to it")
        return None
    return correct


def by_settings(results: Sequence[Result]) -> list[list[Result]]:
    """Group results that differ only in their seed, each seed once, in ascending order.

    Duplicates are reported on standard error and skipped: copies of a run, and evaluations of a run on the task of its
    own test.
    """
    unique: dict[str, Result] = {}
    own = {_test_of(result): result for result in results if not is_evaluation(result)}
    for result in results:
        key = json.dumps([settings(result), seed_of(result)], sort_keys=True)
        repeated = key in unique or (is_evaluation(result) and _test_of(result) in own)
        if repeated:
            name = result.get("experiment") or f"{result['dataset']} {result['method']}"
            task = f"{result['way']}-way {result['shot']}-shot"
            line = f"counted once: {name}, tested {task}, seed {seed_of(result)}, same settings"
            say(line, error=True)
        else:
            unique[key] = result
    groups: dict[str, list[Result]] = {}
    for result in unique.values():
        groups.setdefault(json.dumps(settings(result), sort_keys=True), []).append(result)
    return [sorted(group, key=seed_of) for group in groups.values()]


def settings(result: Result) -> Settings:
    """Return everything that affects accuracy except the seed: data, precision, GPU, configuration and the test's task.

    Keys without a value or with False are left out: keys added by later versions make no difference by themselves.
    """
    run = run_config(result)
    decisive = {
        **dict(flat({key: result.get(key) for key in ("data", "precision", "encoder_parameters")})),
        **training_settings(result),
        "encoder_init.sha256": (result.get("encoder_init") or {}).get("sha256"),
        "test.episodes": result["episodes"],
        # A GPU rounds convolutions to TF32 by default, and few GPUs repeat each other's results.
        "machine.accelerator": (result.get("machine") or {}).get("accelerator"),
    }
    if len(result.get("precisions") or []) > 1:  # the run was resumed with a different precision
        decisive["precisions"] = ", ".join(map(str, result["precisions"]))
    # The best weights were chosen on the run's own task, but an evaluation may use a different one.
    test = {key: result.get(key) for key in ("way", "shot", "query", "concentration")} | {
        key: result["config"].get(key) for key in ("eval_seed", "mirror")
    }
    decisive |= {f"test.{key}": value for key, value in test.items() if not same(value, run.get(key))}
    if result.get("meta_batch") != decisive.get(
        "train.meta_batch"
    ):  # with more processes than that, each takes one episode
        decisive["meta_batch"] = result.get("meta_batch")
    if result.get("batch_parts") not in (None, 1):
        decisive["batch_parts"] = result["batch_parts"]
    hardware = run.get("hardware")
    if isinstance(hardware, dict) and hardware.get("precision") != decisive.get("precision"):
        decisive["train.precision" if decisive.get("precision") else "precision"] = hardware.get("precision")
    tested, trained = (dict(flat({"method": config.get("method")})) for config in (result["config"], run))
    decisive |= {
        f"test.{key}": tested.get(key)
        for key in {**tested, **trained}
        if not same(tested.get(key), trained.get(key)) and not _is_below(key, NOT_DECISIVE)
    }
    return {key: value for key, value in decisive.items() if value is not None}


def training_settings(result: Result) -> Settings:
    """Return what affects accuracy in the configuration of the training, except the seed."""
    config = flat(run_config(result))
    return {key: value for key, value in config if not same(value, None) and not _is_below(key, NOT_DECISIVE)}


def same(one: Any, other: Any) -> bool:
    """Return whether two values of a key mean the same: False is what a version without the key did."""
    return bool(one == other) or all(value is None or value is False for value in (one, other))


def run_config(result: Result) -> Mapping[str, Any]:
    """Return the training configuration; in the result of an evaluation, ``config`` is that of the evaluation."""
    config: Mapping[str, Any] = result.get("run_config") or result["config"]
    return config


def best_validation(result: Result) -> Mapping[str, Any] | None:
    """Return the validation with the best accuracy, that of the chosen weights; None without validation."""
    best: Mapping[str, Any] | None = max(result["validations"], key=lambda point: point["accuracy"], default=None)
    return best


def own_validation(result: Result) -> Mapping[str, Any] | None:
    """Return ``best_validation`` if it was of what the test measured: the same method, task and data set."""
    if not is_evaluation(result):
        return best_validation(result)
    other = [key for key in settings(result) if key.startswith("test.") and key != "test.episodes"]
    return None if other or result.get("trained_on") else best_validation(result)


def seed_of(result: Result) -> int:
    """Return the seed in the training configuration, which takes precedence over the result's own ``seed``."""
    seed: int = run_config(result).get("seed", result["seed"])
    return seed


def split_of(result: Result) -> str | None:
    """Return the name of the class split; None if the data set has only one, or the result does not record it."""
    data = result.get("data")
    return None if data is None else data.get("split")


def is_evaluation(result: Result) -> bool:
    """Whether ``src/evaluate.py`` wrote the result, rather than a training."""
    return "checkpoint" in result


def _test_of(result: Result) -> str:
    """Identify the run and the test task of a result, regardless of the number of episodes."""
    free = ("test.episodes", "test.query", "test.eval_seed", "meta_batch", "machine.accelerator")
    same = {key: value for key, value in settings(result).items() if key not in free}
    return json.dumps([same, seed_of(result)], sort_keys=True)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their dotted keys; a list is a value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _not_counted(result: Result, known_data: bool, evaluations: bool) -> str | None:
    """Return why a valid result must not be reported, or None."""
    if known_data and result.get("data") is None:
        return "older format: split unknown; run it again"
    if not is_evaluation(result):
        return None
    if result.get("split") != "test":
        return f"an evaluation on {result.get('split')} classes instead of test classes"
    return None if evaluations else _not_its_test(result)


def _not_its_test(result: Result) -> str | None:
    """Return why an evaluation on test classes does not count as the test of a run, or None."""
    weights = result.get("weights") or Path(str(result["checkpoint"])).stem  # older format
    configs = result["config"], run_config(result)
    methods = [dict(flat({"method": config.get("method")})).get("method._target_") for config in configs]
    reasons = {
        "an evaluation without training": weights == "untrained",
        "an evaluation that does not record the configuration of its run": result.get("data") is not None
        and not isinstance(result.get("run_config"), dict),
        "an evaluation that does not record the time of the training": result.get("train_seconds") is None,
        f"an evaluation on data other than the training's, {result.get('trained_on')}": result.get("trained_on")
        is not None,
        f"an evaluation of weights {weights}; only the best weights of a run count": weights != "best",
        "an evaluation of a different method than the run's": methods[0] != methods[1],
    }
    return next((why for why, holds in reasons.items() if holds), None)


def wrong(result: Any) -> str | None:
    """Return why some JSON is not a valid result, or None."""
    if not isinstance(result, dict):
        return "it is not a mapping"
    return _wrong_fields(result) or _impossible(result) or _wrong_data(result)


def _wrong_fields(result: Result) -> str | None:
    """Return the fields that are missing or have a wrong type, or None."""
    invalid = [key for key, kind in REQUIRED.items() if not _is(result.get(key), kind)]
    if not is_evaluation(result) and result.get("train_seconds") is None:
        invalid.append("train_seconds")
    invalid += [key for key, kind in OPTIONAL.items() if result.get(key) is not None and not _is(result[key], kind)]
    if invalid:
        return f"missing or invalid: {', '.join(invalid)}"
    if not _is(seed_of(result), int):
        return "missing or invalid: config.seed"
    train = run_config(result).get("train")
    if not isinstance(train, dict) or not _is(train.get("episodes"), int):
        return "missing or invalid: config.train.episodes"
    curve = [point if isinstance(point, dict) else {} for point in result["validations"]]
    if not all(_is(point.get("trained_episodes"), int) and _is(point.get("accuracy"), float) for point in curve):
        return "missing or invalid: validations"
    return None


def _impossible(result: Result) -> str | None:
    """Return the first value that is impossible, or that contradicts the configuration."""
    for key, least, most in (
        ("accuracy", 0, 1),
        ("ci95", 0, 1),
        ("episodes", 2, math.inf),
        ("way", 2, math.inf),
        ("shot", 1, math.inf),
        ("query", 1, math.inf),
        ("train_seconds", 0, math.inf),
        ("test_seconds_per_episode", 0, math.inf),
        ("seed", 0, math.inf),
        ("encoder_parameters", 0, math.inf),
    ):
        if result.get(key) is not None and not least <= result[key] <= most:
            bound = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            return f"its {key} is {result[key]}, but must be {bound}"
    if not all(0 <= point["accuracy"] <= 1 and point["trained_episodes"] >= 0 for point in result["validations"]):
        return "its validations contain an accuracy that is not between 0 and 1, or a negative number of episodes"
    for key in ("way", "shot", "query"):
        if result["config"].get(key) not in (None, result.get(key)):
            return f"its {key} is {result.get(key)}, but its config says {result['config'][key]}"
    if seed_of(result) < 0:
        return f"its config says seed={seed_of(result)}"
    if run_config(result)["train"]["episodes"] < 1:
        return f"its config says train.episodes={run_config(result)['train']['episodes']}"
    return None


def _wrong_data(result: Result) -> str | None:
    """Return what is wrong with the record of the data, or None."""
    data = result.get("data")
    if data is None:
        return None
    counts = [data.get(key) for key in ("classes", "images")]
    names = data.get("class_names_sha256")
    if (
        not isinstance(data.get("split"), str | None)
        or not all(isinstance(count, dict) and all(_is(count.get(name), int) for name in SPLITS) for count in counts)
        or not isinstance(names, dict)
        or not all(isinstance(digest, str) for digest in (*names.values(), data.get("images_sha256")))
    ):
        return "missing or invalid: data, with a split, numbers of classes and images, and digests of names and pixels"
    if data["classes"]["test"] < result["way"]:
        return f"its episodes have {result['way']} classes, but its data only {data['classes']['test']} test classes"
    if result.get("weights") == "untrained" or result.get("trained_on") is not None:
        return None  # it was not trained on these data
    way = run_config(result)["train"].get("way")
    on_episodes = run_config(result)["train"].get("batch_size") is None
    if on_episodes and _is(way, int) and data["classes"]["train"] < way:
        return f"its config says train.way={way}, but its data have only {data['classes']['train']} training classes"
    return None


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _skip(path: Path, why: str) -> None:
    say(f"skipped {path}: {why}", error=True)
