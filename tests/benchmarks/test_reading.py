"""The benchmark of photos, on small ones."""

import re

import numpy as np
import pytest
import torch

from benchmarks import reading
from benchmarks.reading import contests, count_changed, processor_times

SMALL = {"photos": 6, "width": 600, "height": 450}


def test_all_programs_give_the_same_answers_to_photos():
    contest = contests()["photos"]
    ours, *others = (entrant.build(**SMALL)() for entrant in contest.entrants)
    assert ours.shape == (6, 5)
    for result in others:
        assert np.linalg.norm(result - ours) <= contest.tolerance * np.linalg.norm(ours)
    assert np.linalg.norm(ours[0] - ours[1]) > 0  # the photos differ


def test_processor_times_are_shown_for_each_program(capsys):
    processor_times("photos", photos=2, width=300, height=200)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("measured with 2", "ours", "plain loop", "encoder alone", "1.00"))


def test_encoders_are_timed_one_by_one():
    pytest.importorskip("timm", reason="no timm: pip install -e '.[timm]'")
    threads = torch.get_num_threads()
    for entrant in contests()["encoders"].entrants:
        assert entrant.build(entrant.settings["encoder"], photos=2)() == [2]
    torch.set_num_threads(threads)


def test_a_photo_has_detail_of_all_sizes():
    pixels = reading.detail(0, 400, 300)
    assert pixels.shape == (300, 400, 3) and 20 < pixels.std() < 80
    assert 1e4 < len(reading._jpeg(128 + pixels)) < 2e5


@pytest.mark.real_data
def test_changed_labels_are_counted(real_data, monkeypatch, capsys):
    monkeypatch.setenv("FEWSHOT_DATA_DIR", str(real_data))
    monkeypatch.setattr(reading, "HEIGHT", 900)
    count_changed(["encoder=pretrained", "encoder.weights=null"], classes=2, shot=1, queries=2)
    assert re.match(
        r"reduced decoding changes [0-4] of 4 labels; .* differs by \d\.\d+ of", capsys.readouterr().out.strip()
    )
