"""Class batches: what they hold is a function of their number."""

import pytest
import torch

from conftest import make_bank
from fewshot.config import compose
from fewshot.data.classes import ClassBatches
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.errors import FewShotError

KEYS = ("way", "shot", "query", "train", "val", "test", "seed", "eval_seed", "checkpoint_every")


@pytest.fixture
def bank():
    return make_bank({"val": [4, 4], "train": [5, 3, 4], "test": [4, 4]})


def module(bank, *overrides, **settings):
    config = compose("run_dir=x", "way=2", "query=2", "dataset.size=16", *overrides)
    made = EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="unused", **settings)
    made._bank = bank
    return made


def test_a_pass_has_every_training_image_once_with_its_class(bank):
    batches = ClassBatches(bank, 5, seed=0)
    drawn = [batches[number] for number in range(12)]  # 60 images: five passes over twelve
    positions, labels = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
    for one in positions.view(5, 12):
        assert sorted(one.tolist()) == list(range(8, 20))
    assert len({tuple(one.tolist()) for one in positions.view(5, 12)}) == 5
    expected = torch.bucketize(positions, torch.tensor([13, 16]), right=True)
    assert torch.equal(labels, expected)


def test_a_batch_is_a_function_of_its_number_and_the_seed(bank):
    one, other = ClassBatches(bank, 7, seed=0), ClassBatches(bank, 7, seed=1)
    forwards = [one[number][0] for number in range(6)]
    backwards = [one[number][0] for number in reversed(range(6))][::-1]
    assert all(map(torch.equal, forwards, backwards))
    assert not all(map(torch.equal, forwards, (other[number][0] for number in range(6))))


def test_a_batch_may_be_larger_than_the_data(bank):
    positions, _ = ClassBatches(bank, 30, seed=0)[1]
    assert len(positions) == 30 and positions.unique().numel() == 12


def test_the_loader_continues_after_the_batches_of_its_stage(bank):
    settings = ["train.batch_size=5", "train.meta_batch=2", "train.episodes=10", "val.every=4"]
    data = module(bank, *settings, trains_on="classes")
    data.setup()
    loader = data.train_dataloader()
    served = [*loader, *loader, *loader]
    assert [(batch.share.start, batch.share.stop) for batch in served] == [(n, n + 2) for n in range(0, 10, 2)]
    drawn = ClassBatches(bank, 5, data.train_episode["seed"])
    for batch in served:
        expected = [drawn[number] for number in range(batch.share.start, batch.share.stop)]
        assert torch.equal(batch.positions, torch.stack([positions for positions, _ in expected]))
        images, labels = batch.load()
        assert images.shape == (10, 1, 16, 16) and torch.equal(
            labels, torch.cat([drawn_labels for _, drawn_labels in expected])
        )


def test_transforms_apply_to_each_batch_by_its_number(bank):
    def noise(images):
        return torch.randint(0, 256, images.shape, dtype=torch.uint8)

    first, again = (module(bank, "train.batch_size=5", trains_on="classes", transform=noise) for _ in "ab")
    for data in (first, again):
        data.setup()
    one, other = next(iter(first.train_dataloader())), next(iter(again.train_dataloader()))
    plain = first.images(one.positions).flatten(0, 1)
    assert torch.equal(one.load()[0], other.load()[0]) and not torch.equal(one.load()[0], plain)


@pytest.mark.parametrize(
    ("overrides", "trains_on", "why"),
    [
        ([], "classes", "train.batch_size=null must be at least 1"),
        (["train.batch_size=0"], "classes", "train.batch_size=0 must be at least 1"),
        (["train.batch_size=8"], "episodes", "train.batch_size=8: this method trains on episodes"),
    ],
)
def test_a_batch_size_is_accepted_only_by_methods_that_train_on_batches(bank, overrides, trains_on, why):
    with pytest.raises(FewShotError, match=why):
        module(bank, *overrides, trains_on=trains_on).setup()


def test_one_class_is_nothing_to_tell_apart():
    with pytest.raises(FewShotError, match="training needs at least 2"):
        ClassBatches(make_bank({"train": [5], "val": [2, 2], "test": [2, 2]}), 4, seed=0)


def test_training_classes_may_be_fewer_than_the_way_of_the_tests():
    data = module(make_bank({"train": [9, 9], "val": [4] * 5, "test": [4] * 5}), "train.batch_size=4", "way=5")
    data.trains_on = "classes"
    data.setup()
    assert "train" not in data.datasets
