import threading

import numpy as np
import pytest

from benchmarks import training

SHAPE = {"size": 16, "channels": 1, "classes": 20, "images": 6, "way": 3, "shot": 1, "query": 2, "steps": 3}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.slow
def test_all_training_loops_have_the_same_losses():
    lightning, fit = training.through_lightning(SHAPE)
    threading.Thread(target=fit, daemon=True).start()
    works = [lightning, training.bare_loop(SHAPE), training.textbook(SHAPE)]
    first, *others = [work() for work in works]
    assert first.shape == (3,) and len(set(first.tolist())) == 3
    for losses in others:
        np.testing.assert_allclose(losses, first, rtol=1e-3)
    np.testing.assert_allclose(lightning(), works[2](), rtol=1e-2)  # the next three


def test_all_evaluations_have_the_same_accuracy():
    assert training.evaluate(SHAPE, 30)() == pytest.approx(training.textbook_evaluate(SHAPE, 30)(), abs=0.01)


def test_all_loaders_make_the_same_episodes():
    found, expected = training.make_episodes(SHAPE, 7)(), training.textbook_make_episodes(SHAPE, 7)()
    assert found.shape == (7,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_bank_matches_the_files():
    np.testing.assert_array_equal(training.build_bank(100)(), training.textbook_build(100)())


def test_the_contests_for_a_gpu_compute_the_same(monkeypatch):
    for name in ("OMNIGLOT", "MINIIMAGENET", "MATCHING"):
        monkeypatch.setattr(training, name, SHAPE)
    contests = training.device_contests("cpu")
    assert list(contests) == ["protonet_omniglot", "protonet_miniimagenet", "matching_omniglot"]
    for name in ("protonet_omniglot", "matching_omniglot"):
        results = []
        for entrant in contests[name].entrants:
            work = entrant.build(**{**entrant.settings, "shape": SHAPE})
            if isinstance(work, tuple):
                work, fit = work
                threading.Thread(target=fit, daemon=True).start()
            results.append(work())
        for losses in results[1:]:
            np.testing.assert_allclose(losses, results[0], rtol=1e-3)
