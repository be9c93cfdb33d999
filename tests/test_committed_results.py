"""Committed results: what the guides say of them, and that they name nobody's directories."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fewshot.results import wrong

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"
GUIDE = RESULTS.parent / "guides" / "reproduce.md"


@pytest.mark.parametrize("study", ["splits", "reproduction", "simpleshot"])
def test_committed_results_are_sound_and_name_no_directory_outside(study):
    paths = sorted((RESULTS / study).rglob("results.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        named = result["data"]["split"] is not None or result["dataset"] == "miniimagenet"  # whose split has no name
        assert wrong(result) is None and named, path
        absolute = [text for text in _strings(result["config"]) if text.startswith(("/", "~"))]
        assert absolute == [], path


def _strings(value):
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, str):
        yield value
    elif not isinstance(value, int | float | None):
        for inner in value:
            yield from _strings(inner)


def test_the_table_of_splits_shows_the_committed_results():
    cells = {}
    for path in (RESULTS / "splits").rglob("results.json"):
        result = json.loads(path.read_text())
        assert (result["way"], result["shot"], result["episodes"]) == (20, 1, 10_000)
        shown = f"{100 * result['accuracy']:.2f} ± {100 * result['ci95']:.2f}"
        cells[result["data"]["split"], result["seed"]] = str(result["data"]["classes"]["test"] // 4), shown
    guide = GUIDE.read_text(encoding="utf-8")
    for split in ("vinyals", "lake", "random"):
        row = re.search(rf"^\| {split} \| (\d+) \| [^|]+ \| (.+) \| (.+) \|$", guide, re.MULTILINE)
        assert row is not None
        assert [(row[1], row[2]), (row[1], row[3])] == [cells[split, seed] for seed in (0, 1)]


def test_the_table_of_the_classifier_shows_the_committed_results():
    guide = GUIDE.read_text(encoding="utf-8")
    rows = {
        "nearest class mean by cosine": "reproduction/miniimagenet/classifier{tail}",
        "SimpleShot (centred and normalised)": "simpleshot/{shot}shot",
        "nearest class mean by cosine, second classifier": "reproduction/miniimagenet/classifier_cosine{tail}",
        "SimpleShot, second classifier": "simpleshot/second_{shot}shot",
        "prototypical network, 3,200 episodes of 20 classes after the second classifier": (
            "reproduction/miniimagenet/finetuned_protonet_5way_{shot}shot"
        ),
        "SimpleShot on its encoder": "simpleshot/finetuned_{shot}shot",
        "this prototypical network with `mirror=true`": "reproduction/miniimagenet/mirrored_protonet_5way_{shot}shot",
        "nearest class mean by cosine, third classifier": "reproduction/miniimagenet/classifier_signed{tail}",
        "SimpleShot, third classifier": "simpleshot/third_{shot}shot",
        "nearest class mean by cosine, third classifier, with `mirror=true`": (
            "reproduction/miniimagenet/classifier_signed_mirrored{tail}"
        ),
        "prototypical networks, 3,200 episodes after the third classifier, three seeds": "finetuned_third/{shot}shot",
        "these three with `mirror=true`": "finetuned_third/mirrored_{shot}shot",
        "nearest class mean by cosine, fourth classifier": "reproduction/miniimagenet/classifier_longer{tail}",
        "SimpleShot, fourth classifier": "simpleshot/fourth_{shot}shot",
        "nearest class mean by cosine, fourth classifier, with `mirror=true`": (
            "reproduction/miniimagenet/classifier_longer_mirrored{tail}"
        ),
        "SimpleShot, fourth classifier, with `mirror=true`": "simpleshot/fourth_mirrored_{shot}shot",
        "prototypical networks, 300 episodes after the fourth classifier, three seeds": (
            "reproduction/miniimagenet/longer_protonet_5way_{shot}shot"
        ),
        "these prototypical networks with `mirror=true`": (
            "reproduction/miniimagenet/longer_mirrored_protonet_5way_{shot}shot"
        ),
        "matching networks by scaled cosine, 300 episodes after the fourth classifier, three seeds": (
            "reproduction/miniimagenet/longer_matching_5way_{shot}shot"
        ),
        "these matching networks with `mirror=true`": (
            "reproduction/miniimagenet/longer_mirrored_matching_5way_{shot}shot"
        ),
    }
    for name, place in rows.items():
        cells = []
        for shot, tail in ((1, ""), (5, "_5shot")):
            folder = RESULTS / place.format(shot=shot, tail=tail)
            results = [json.loads(path.read_text()) for path in sorted(folder.rglob("results.json"))]
            assert len(results) == (3 if "networks" in name or "three" in name else 1)
            for result in results:
                assert (result["way"], result["shot"], result["episodes"], wrong(result)) == (5, shot, 10_000, None)
            accuracy, ci95 = np.mean([result["accuracy"] for result in results]), max(r["ci95"] for r in results)
            cells.append(f"{100 * accuracy:.2f} ± {100 * ci95:.2f}")
        assert f"| {name} | {cells[0]} | {cells[1]} |" in guide


@pytest.mark.parametrize("study", ["classifiers", "classifiers_imagenet", "cross_domain"])
def test_the_tables_of_studies_show_the_committed_results(study):
    guide = (GUIDE.parent / "classifiers.md").read_text(encoding="utf-8")
    with (RESULTS / "studies" / study / "results.csv").open(encoding="utf-8") as file:
        results = list(csv.DictReader(file))
    for result in results:
        shown = f"{100 * float(result['accuracy']):.2f} ± {100 * float(result['ci95']):.2f}"
        if study != "cross_domain":
            first = rf"{result['method']}( \w+)? \| [^|]+ \|[^|]* {int(result['episodes']):,}\b[^|]*"
        else:
            first = rf"{result['trained_on']} \| {result['dataset']}"
        assert re.search(rf"^\| {first} \|.* {re.escape(shown)} \|", guide, re.MULTILINE), result
        assert not result["checkpoint"].startswith("/")
    assert len(results) >= 16
