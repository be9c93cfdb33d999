"""The comparison of classifiers of a few photos a class."""

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from benchmarks import photos
from fewshot.config import compose
from fewshot.encoders.conv4 import Conv4
from fewshot.methods.auto import Auto
from fewshot.predictor import Predictor


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


def test_the_table_has_a_row_for_each_shot_and_few_classes_are_halved(embeddings, monkeypatch):
    monkeypatch.setattr(photos, "SHOTS", (1, 3))
    for count, way in ((20, 10), (9, 4)):
        rows = [row.split(" | ") for row in photos.compare("some", embeddings[:count], 2)]
        assert [row[:3] for row in rows] == [["| some", str(way), shot] for shot in "13"]
        # The default is scikit-learn's classifier, unless examples that were left out say otherwise.
        assert rows[0][4] == rows[0][5] and rows[0][6] == "0.0 ± 0.0"


def test_photos_in_folders_are_embedded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "IMAGES", 3)
    for split, name, count in (("a", "cat", 2), ("b", "cat", 2), ("a", "dog", 3), ("a", "few", 2)):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30), (number * 60, len(split + name) * 20, 90)).save(
                tmp_path / split / name / f"{split}{number}.png"
            )
    torch.manual_seed(0)
    method = Auto(Conv4(channels=3, size=28, filters=4))
    dataset = OmegaConf.create({"size": 28, "channels": 3, "normalise": "plain"})
    predictor = Predictor(method, dataset, False, compose("hardware=cpu", name="predict").hardware)
    found = photos.of_folder(tmp_path)
    assert {name: len(files) for name, files in found.items()} == {"cat": 4, "dog": 3, "few": 2}
    embeddings = photos.embed(predictor, "some", found, tmp_path / "cache")
    assert embeddings.shape[:2] == (2, 3)
    monkeypatch.setattr(predictor, "represent", None)
    assert torch.equal(photos.embed(predictor, "some", found, tmp_path / "cache"), embeddings)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(100, 1)
    truth = (torch.arange(100) >= 70).long()  # 70 right
    assert photos.calibration_error(probabilities, truth) == pytest.approx(0.2, abs=1e-6)


def test_the_study_names_the_best_temperature_and_what_others_would_do_to_the_calibration(embeddings, monkeypatch):
    monkeypatch.setattr(photos, "SHOTS", (2, 1))
    more, one, errors, *_ = photos.study("some", embeddings, 2)
    assert more.startswith("some, way 2, shot 2: best temperature 0.") and "(nearest class mean)" in more
    assert one.startswith("some, way 2, shot 1: ")
    draw = next(photos.draws(embeddings, 2, 1, 1))
    own = photos.score(draw, photos.auto(draw), by_familiarity=False).calibration_error
    monkeypatch.setattr(photos, "FACTORS", (1,))
    monkeypatch.setattr(photos, "SHOTS", (1,))
    _, errors, *_ = photos.study("some", embeddings, 1)
    assert errors.startswith("    calibration error at 1 times the temperature of 0.016: ")
    assert errors.endswith(f": {100 * own:.1f}")
