from dataclasses import replace
from itertools import zip_longest
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
KEYS = ("way", "shot", "query", "train", "val", "test", "seed", "eval_seed", "checkpoint_every")


def make(*overrides, trainer=None):
    small = ["way=3", "shot=2", "query=4", "train.way=6", "train.episodes=10", "val.every=4", "val.episodes=5"]
    config = compose("run_dir=x", *small, "test.episodes=6", *overrides)
    module = EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="unused")
    module._bank = BANK
    module.setup()
    module.trainer = trainer
    return module


def single(loader):
    """The episodes of a loader, out of their meta-batches."""
    return [episode for batch in loader for episode in batch.tasks()]


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
        episodes = single(loader)
        assert len(episodes) == count
        for episode in episodes:
            assert episode.way == way
            assert episode.support.shape == (way * shot,) and episode.query.shape == (way * query,)
            assert episode.support_labels.bincount().tolist() == [shot] * way
            assert episode.query_labels.bincount().tolist() == [query] * way


def test_evaluation_meets_the_same_episodes_every_time_and_under_every_training_seed():
    one, other = make("seed=1"), make("seed=2")
    assert same(one.val_dataloader(), one.val_dataloader())
    assert same(one.test_dataloader(), other.test_dataloader())
    assert not same(one.train_dataloader(), other.train_dataloader())
    assert not same(one.test_dataloader(), make("eval_seed=1").test_dataloader())


def after(trained, *overrides, rank=0, world_size=1):
    """The module of a run that has trained on so many episodes."""
    module = make(*overrides, trainer=trainer_of(rank=rank, world_size=world_size))
    module.load_state_dict({"trained": trained})
    return module


def stages(*overrides, trained=0):
    """From one checkpoint to the next: the training episodes by number, and whether a validation follows."""
    module = after(trained, *overrides)
    while module.trained < module.train_episodes:
        batches = list(module.train_dataloader().batch_sampler)
        yield module.stage, [[tuple(of) for of in batch] for batch in batches], module.validates
        module.trained = module.stage.stop


def test_training_goes_from_checkpoint_to_checkpoint_and_from_validation_to_validation():
    # val.every=4, train.episodes=10
    found = [(of.start, of.stop, validates) for of, _, validates in stages("checkpoint_every=3")]
    assert found == [(0, 3, False), (3, 4, True), (4, 7, False), (7, 8, True), (8, 10, True)]
    found = [(of.start, of.stop, validates) for of, _, validates in stages("checkpoint_every=100")]
    assert found == [(0, 4, True), (4, 8, True), (8, 10, True)]
    assert not same(after(0).train_dataloader(), after(4).train_dataloader())
    assert same(after(0).val_dataloader(), after(4).val_dataloader())


def test_the_episodes_do_not_depend_on_where_the_checkpoints_lie_nor_on_where_a_run_resumes():
    expected = [(0, n) for n in range(4)] + [(1, n) for n in range(4)] + [(2, n) for n in range(2)]
    for every in (1, 2, 3, 5):
        for trained in (0, 1, 5, 9):
            numbers = [
                n
                for _, batches, _ in stages(f"checkpoint_every={every}", trained=trained)
                for of in batches
                for n in of
            ]
            assert numbers == expected[trained:]


def test_ranks_share_out_the_episodes_of_one_process():
    whole, *ranks = after(4), after(4, rank=0, world_size=2), after(4, rank=1, world_size=2)
    for get in ("train_dataloader", "test_dataloader"):
        shares = [single(getattr(rank, get)()) for rank in ranks]
        interleaved = [episode for pair in zip_longest(*shares) for episode in pair if episode is not None]
        expected = single(getattr(whole, get)())
        assert len(interleaved) == len(expected)
        assert all(torch.equal(a.query, b.query) for a, b in zip(interleaved, expected, strict=True))


def test_a_step_has_an_episode_for_each_piece_of_each_process():
    module = make("train.meta_batch=2", "val.every=4", trainer=trainer_of(rank=1, world_size=3, pieces=2))
    assert module.meta_batch == module.every == 6
    batches = list(module.train_dataloader().batch_sampler)
    assert [[number for _, number in batch] for batch in batches] == [[1], [4]] and module.weights == [1, 1]
    with pytest.raises(FewShotError, match=r"val\.episodes=5 cannot be shared out to 6 processes; ask for at least"):
        make(trainer=trainer_of(world_size=6)).setup()


def test_stages_end_between_whole_meta_batches_and_the_last_one_takes_what_is_left():
    found = list(stages("train.meta_batch=3", "checkpoint_every=2"))  # val.every=4, train.episodes=10
    assert [(of.start, of.stop, validates) for of, _, validates in found] == [
        (0, 3, False),
        (3, 6, True),
        (6, 9, False),
        (9, 10, True),
    ]
    assert [[len(batch) for batch in batches] for _, batches, _ in found] == [[3], [3], [3], [1]]


def trainer_of(dtype=torch.float32, training=True, rank=0, world_size=1, pieces=1):
    method = SimpleNamespace(dtype=dtype, device=torch.device("cpu"))
    strategy = SimpleNamespace(reduce=lambda tensor, **_: tensor)
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=pieces,
        training=training,
        lightning_module=method,
        strategy=strategy,
    )


@pytest.mark.parametrize(("kind", "dtype"), [("range", torch.float32), ("standardise", torch.float64)])
def test_images_are_gathered_and_normalised_after_the_transfer_to_the_device(kind, dtype):
    module = make(f"dataset.normalise={kind}", trainer=trainer_of(dtype))
    raw = next(iter(module.val_dataloader()))
    batch = module.on_after_batch_transfer(raw, 0)
    assert torch.equal(batch.support, normalise(BANK.images[raw.support], kind).to(dtype))
    assert torch.equal(batch.query, normalise(BANK.images[raw.query], kind).to(dtype))
    assert torch.equal(batch.query_labels, raw.query_labels) and batch.way == raw.way
    assert batch.support.shape == (5, 6, 3, 16, 16) and batch.query.dtype == dtype
    bound = 1.0 if kind == "range" else 5.0
    assert 0.9 < batch.query.max() <= bound


def test_in_evaluation_every_image_in_use_is_embedded_once():
    trainer = trainer_of(training=False)
    module = make("val.episodes=30", trainer=trainer)
    embedded = []

    def encoder(images):
        embedded.append(images)
        return images.flatten(1)[:, :7]

    batches = list(module.val_dataloader())
    expected = [module.on_after_batch_transfer(batch, 0) for batch in batches]
    module.embed("val", encoder)
    used = torch.cat([torch.cat([batch.support.flatten(), batch.query.flatten()]) for batch in batches]).unique()
    assert sum(map(len, embedded)) == len(used)
    for batch, images in zip(batches, expected, strict=True):
        found = module.on_after_batch_transfer(batch, 0)
        assert torch.equal(found.support, images.support.flatten(2)[..., :7])
        assert torch.equal(found.query, images.query.flatten(2)[..., :7])
    trainer.training = True
    raw = next(iter(module.train_dataloader()))
    assert module.on_after_batch_transfer(raw, 0).query.shape == (1, 30, 3, 16, 16)


@pytest.mark.parametrize("processes", [2, 15])
def test_processes_share_out_the_images_to_embed(monkeypatch, processes):
    monkeypatch.setattr(datamodule, "EMBEDDED_TOGETHER", 8)
    batches = []

    def embeddings(rank, world_size):
        module = make("val.episodes=15", "test.episodes=15", trainer=trainer_of(rank=rank, world_size=world_size))
        module.embed("test", lambda images: batches.append(len(images)) or images.flatten(1))
        return module._embedded[1]

    whole = embeddings(0, 1)
    pieces = batches.copy()
    assert sum(pieces) == len(whole) and len(pieces) == 9
    batches.clear()
    assert torch.equal(sum(embeddings(rank, processes) for rank in range(processes)), whole)
    assert sorted(batches) == sorted(pieces + [8] * max(0, processes - len(pieces)))


def test_the_bank_depends_on_the_settings_of_its_source_resolved_or_not(monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr(datamodule, "open_bank", lambda *arguments: asked.append(arguments) or BANK)
    source = {"_target_": "fewshot.data.glyphs.glyphs", "size": "${dataset.size}", "samples": 3, "seed": 0}
    config = OmegaConf.merge(compose("run_dir=x"), {"dataset": {"size": 14, "source": source}})
    module = EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="somewhere")
    assert module.bank is BANK
    ((name, _, settings, cache_dir),) = asked
    assert (name, settings, cache_dir) == ("glyphs", source | {"size": 14}, "somewhere")


def test_what_is_odd_about_the_images_is_told_in_a_line_each_by_one_process(monkeypatch, capsys):
    odd = replace(BANK, findings=("blank classes: a", "pictures twice: b\nc"))
    monkeypatch.setattr(datamodule, "open_bank", lambda *_: odd)
    monkeypatch.setattr(datamodule, "instantiate", lambda _: None)
    config = compose("run_dir=x", "dataset=omniglot")
    modules = [EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="") for _ in "ab"]
    assert modules[0].bank is modules[0].bank is odd
    told = "warning: omniglot: blank classes: a\nwarning: omniglot: pictures twice: b\\nc\n"
    assert capsys.readouterr().out == told
    monkeypatch.setattr(datamodule.rank_zero_only, "rank", 1)
    assert modules[1].bank is odd
    assert capsys.readouterr().out == ""


def test_every_split_is_checked_before_training():
    with pytest.raises(FewShotError, match="way=6 is more than the 5 classes of the val split"):
        make("way=6")
    with pytest.raises(FewShotError, match=r"train\.way=9 is more than the 8 classes of the train split"):
        make("train.way=9")
    with pytest.raises(FewShotError, match=r"shot=2 and query=11 need 13 images .* of the val split has 12"):
        make("query=11", "train.query=4")
