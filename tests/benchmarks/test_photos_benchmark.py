"""The comparison of classifiers of a few photos a class."""

import pytest
import torch

from benchmarks import photos


@pytest.fixture
def embeddings():
    """Of 20 classes, which overlap."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 1, 32, generator=generator)
    return 2 + centres + torch.randn(20, photos.IMAGES, 32, generator=generator)


def test_draws_repeat_and_never_ask_what_is_in_the_support(embeddings):
    first, second = (list(photos.draws(embeddings, 5, 2, 3)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        assert one.support.shape == (10, 32) and one.query.shape == (5 * photos.QUERY, 32)
        assert not (one.support[:, None] == one.query).all(-1).any()
        assert not (one.unseen[:, None] == one.query).all(-1).any()


def test_the_table_has_a_row_for_each_classifier_and_their_difference(embeddings, monkeypatch):
    monkeypatch.setattr(photos, "SHOTS", (1, 3))
    rows = list(photos.compare("some", embeddings, 2))
    assert len(rows) == 2 * (len(photos.CLASSIFIERS) + 1)
    assert all(row.count("|") == 8 and row.startswith("| some | ") for row in rows)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(100, 1)
    truth = (torch.arange(100) >= 70).long()  # 70 right
    assert photos.calibration_error(probabilities, truth) == pytest.approx(0.2, abs=1e-6)


def test_the_study_names_the_best_temperature(embeddings, monkeypatch):
    monkeypatch.setattr(photos, "SHOTS", (2,))
    assert "way 2, shot 2: best temperature 0." in next(photos.study(embeddings, 2))
