from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from conftest import make_bank
from fewshot.config import compose
from fewshot.data import datamodule
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.images import normalise
from fewshot.errors import FewShotError

BANK = make_bank({"train": [12] * 8, "val": [12] * 5, "test": [12] * 6}, channels=3)
KEYS = ("way", "shot", "query", "train", "val", "test", "seed", "eval_seed")


def make(*overrides, trainer=None):
    small = ["way=3", "shot=2", "query=4", "train.way=6", "train.episodes=10", "val.every=4", "val.episodes=5"]
    config = compose("run_dir=x", *small, "test.episodes=6", *overrides)
    module = EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="unused")
    module._bank = BANK
    module.setup()
    module.trainer = trainer
    return module


def single(loader):
    """The episodes of a loader, be it one of meta-batches or not."""
    return [e for batch in loader for e in (batch.tasks() if batch.support_labels.ndim == 2 else [batch])]


def same(loader, other):
    return all(
        torch.equal(a.support, b.support) and torch.equal(a.query, b.query)
        for a, b in zip(single(loader), single(other), strict=True)
    )


def test_loaders_give_episodes_of_the_make_asked_for():
    module = make()
    for loader, way, shot, query, count in (
        (module.train_dataloader(), 6, 2, 5, 4),
        (module.val_dataloader(), 3, 2, 4, 5),
        (module.test_dataloader(), 3, 2, 4, 6),
    ):
        episodes = list(loader)
        assert len(episodes) == len(loader) == count
        for episode in single(episodes):
            assert episode.way == way
            assert episode.support.shape == (way * shot, 16, 16, 3) and episode.support.dtype == torch.uint8
            assert episode.query.shape == (way * query, 16, 16, 3)
            assert episode.support_labels.bincount().tolist() == [shot] * way
            assert episode.query_labels.bincount().tolist() == [query] * way


def test_evaluation_meets_the_same_episodes_every_time_and_under_every_training_seed():
    one, other = make("seed=1"), make("seed=2")
    assert same(one.val_dataloader(), one.val_dataloader())
    assert same(one.test_dataloader(), other.test_dataloader())
    assert not same(one.train_dataloader(), other.train_dataloader())
    assert not same(one.test_dataloader(), make("eval_seed=1").test_dataloader())


def epoch(number, rank=0, world_size=1):
    return make(trainer=SimpleNamespace(current_epoch=number, global_rank=rank, world_size=world_size))


def test_epochs_differ_and_the_last_one_holds_what_is_left():
    assert [len(epoch(number).train_dataloader()) for number in range(3)] == [4, 4, 2]
    assert epoch(0).epochs == 3 and [epoch(0).episodes_by(number) for number in range(4)] == [0, 4, 8, 10]
    assert not same(epoch(0).train_dataloader(), epoch(1).train_dataloader())
    assert same(epoch(0).val_dataloader(), epoch(1).val_dataloader())


def test_ranks_share_out_the_episodes_of_one_process():
    whole, *ranks = epoch(1), epoch(1, 0, 2), epoch(1, 1, 2)
    for get in ("train_dataloader", "test_dataloader"):
        shares = [single(getattr(rank, get)()) for rank in ranks]
        interleaved = [episode for pair in zip(*shares, strict=True) for episode in pair]
        assert same(getattr(whole, get)(), interleaved)


def test_validations_come_between_whole_meta_batches_and_the_last_one_takes_what_is_left():
    module = make("train.meta_batch=3", trainer=SimpleNamespace(current_epoch=1, global_rank=0, world_size=1))
    assert module.every == 6 and module.epochs == 2  # val.every=4, train.episodes=10
    assert [len(batch.query) for batch in module.train_dataloader()] == [3, 1]


@pytest.mark.parametrize("kind", ["range", "standardise"])
def test_images_are_normalised_after_the_transfer_to_the_device(kind):
    trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace(dtype=torch.float32))
    module = make(f"dataset.normalise={kind}", trainer=trainer)
    raw = next(iter(module.val_dataloader()))
    episode = module.on_after_batch_transfer(raw, 0)
    assert torch.equal(episode.support, normalise(raw.support, kind))
    assert torch.equal(episode.query, normalise(raw.query, kind))
    assert torch.equal(episode.query_labels, raw.query_labels) and episode.way == raw.way
    assert episode.support.shape == (6, 3, 16, 16) and episode.query.dtype == torch.float32
    bound = 1.0 if kind == "range" else 5.0
    assert 0.9 < episode.query.max() <= bound


def test_the_bank_depends_on_the_settings_of_its_source_resolved_or_not(monkeypatch):
    monkeypatch.setattr(datamodule, "open_bank", lambda *arguments: arguments)
    source = {"_target_": "fewshot.data.glyphs.glyphs", "size": "${dataset.size}", "samples": 3, "seed": 0}
    config = OmegaConf.merge(compose("run_dir=x"), {"dataset": {"size": 14, "source": source}})
    module = EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="somewhere")
    name, _, settings, cache_dir = module.bank
    assert (name, settings, cache_dir) == ("glyphs", source | {"size": 14}, "somewhere")


def test_every_split_is_checked_before_training():
    with pytest.raises(FewShotError, match="way=6 is more than the 5 classes of the val split"):
        make("way=6")
    with pytest.raises(FewShotError, match=r"train\.way=9 is more than the 8 classes of the train split"):
        make("train.way=9")
    with pytest.raises(FewShotError, match=r"shot=2 and query=11 need 13 images .* of the val split has 12"):
        make("query=11", "train.query=4")
