"""The results that training runs leave: found anywhere below some folders, checked, and sorted by what they repeat."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewshot.errors import FewShotError
from fewshot.files import read_json

Result = Mapping[str, Any]  # the content of a results.json, as fewshot.training writes it

# What the readers of results need of one.
NEEDED = {
    "dataset": str,
    "method": str,
    "way": int,
    "shot": int,
    "accuracy": float,
    "ci95": float,
    "episodes": int,
    "seed": int,
    "train_seconds": float,
    "validations": list,
    "overrides": list,
    "config": dict,
}
# What one may lack: results of earlier versions do, and methods without a distance.
OPTIONAL = {"experiment": str, "budget": str, "distance": str, "machine": dict}
# The keys of a run's configuration that decide its accuracy, the seed left out.
DECISIVE = ("way", "shot", "query", "train", "val", "test", "eval_seed", "dataset", "method")


def read_results(runs: str | Sequence[str]) -> list[Result]:
    """Read every ``results.json`` anywhere below some folders; what is broken or foreign is named, and left out.

    Args:
        runs: the folders, or such files themselves; a file that is reached twice counts once.

    Returns:
        The results, in the order of ``runs`` and of the paths below each.

    Raises:
        FewShotError: there are none.
    """
    places = [Path(run).expanduser() for run in ([runs] if isinstance(runs, str) else runs)]
    found = find_results(places)
    if not found:
        told = ", ".join(map(str, places))
        raise FewShotError(f"no results.json of a run lies below {told}; run it first, or name its folder: runs=PATH")
    return list(found.values())


def find_results(places: Sequence[Path]) -> dict[Path, Result]:
    """The same, each with the path of its file; there may be none."""
    found: dict[Path, Result] = {}
    for place in places:
        if not place.exists():
            _skip(place, "there is no such file or folder")
        for path in [place] if place.is_file() else sorted(place.rglob("results.json")):
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
                    found[path.resolve()] = result
    return found


def by_settings(results: Sequence[Result]) -> list[list[Result]]:
    """Gather the results that differ in their seed only, each seed once, by ascending seed.

    The same run again, a copy say, is named on the standard error and left out: it says nothing new.
    """
    groups: dict[str, dict[int, Result]] = {}
    for result in results:
        group = groups.setdefault(_settings(result), {})
        if result["seed"] in group:
            told = result.get("experiment") or f"{result['dataset']} {result['method']}"
            print(f"counted once: {told}, seed {result['seed']}, at the same settings", file=sys.stderr)
        group.setdefault(result["seed"], result)
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def _settings(result: Result) -> str:
    settings = {key: result["config"].get(key) for key in DECISIVE} | {"budget": result.get("budget")}
    settings["experiment"] = result.get("experiment")
    # Where the data lay decides nothing.
    return re.sub(r'"data_dir": "[^"]*"', "", json.dumps(settings, sort_keys=True))


def wrong(result: Any) -> str | None:
    """What keeps some JSON from being a result; None if nothing does."""
    if not isinstance(result, dict):
        return "it is no mapping"
    lacking = [key for key, kind in NEEDED.items() if not _is(result.get(key), kind)]
    lacking += [key for key, kind in OPTIONAL.items() if result.get(key) is not None and not _is(result[key], kind)]
    if lacking:
        return f"it has no sound {', '.join(lacking)}"
    train = result["config"].get("train")
    if not isinstance(train, dict) or not _is(train.get("episodes"), int):
        return "its config has no sound train.episodes"
    curve = [of if isinstance(of, dict) else {} for of in result["validations"]]
    if not all(_is(of.get("trained_episodes"), int) and _is(of.get("accuracy"), float) for of in curve):
        return "it has no sound validations"
    return None if 0 <= result["accuracy"] <= 1 else f"its accuracy is {result['accuracy']}"


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _skip(path: Path, why: str) -> None:
    print(f"skipped {path}: {why}", file=sys.stderr)
