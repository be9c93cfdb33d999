from dataclasses import replace
from functools import partial
from itertools import product, zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from conftest import make_bank
from fewshot.config import compose
from fewshot.data import datamodule
from fewshot.data.bank import SPLITS, ImageClass, Source
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import Episode, EpisodeIndex
from fewshot.data.images import normalise
from fewshot.data.loaders import EvaluationLoader
from fewshot.errors import FewShotError
from fewshot.evaluation import OneSplit
from fewshot.training import make_data

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
    return [episode for batch in loader for episode in batch.episodes.tasks()]


def same(loader, other):
    return all(
        torch.equal(a.support, b.support) and torch.equal(a.query, b.query)
        for a, b in zip(single(loader), single(other), strict=True)
    )


def test_loaders_yield_episodes_of_the_requested_task():
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
        batches = list(module.train_dataloader())
        yield module.stage, [[tuple(number) for number in batch.share.numbers] for batch in batches], module.validates
        module.trained = module.stage.stop


def test_training_pauses_at_every_checkpoint_and_validation():
    # val.every=4, train.episodes=10
    found = [(stage.start, stage.stop, validates) for stage, _, validates in stages("checkpoint_every=3")]
    assert found == [(0, 3, False), (3, 4, True), (4, 7, False), (7, 8, True), (8, 10, True)]
    found = [(stage.start, stage.stop, validates) for stage, _, validates in stages("checkpoint_every=100")]
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
                for batch in batches
                for n in batch
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
    shares = [batch.share for batch in module.train_dataloader()]
    assert [[number for _, number in share.numbers] for share in shares] == [[1], [4]]
    assert [share.weight for share in shares] == [1, 1]
    assert [share.completes for share in shares] == [False, True] and shares[0][2:4] == shares[1][2:4] == (0, 6)
    with pytest.raises(FewShotError, match=r"val\.episodes=5 cannot be shared out to 6 processes; request at least"):
        make(trainer=trainer_of(world_size=6)).setup()


def test_stages_end_between_meta_batches_and_the_last_one_has_the_rest():
    found = list(stages("train.meta_batch=3", "checkpoint_every=2"))  # val.every=4, train.episodes=10
    assert [(stage.start, stage.stop, validates) for stage, _, validates in found] == [
        (0, 3, False),
        (3, 6, True),
        (6, 9, False),
        (9, 10, True),
    ]
    assert [[len(batch) for batch in batches] for _, batches, _ in found] == [[3], [3], [3], [1]]


def trainer_of(rank=0, world_size=1, pieces=1):
    return SimpleNamespace(
        global_rank=rank, world_size=world_size, accumulate_grad_batches=pieces, training=True, should_stop=False
    )


@pytest.mark.parametrize(("kind", "dtype"), [("range", torch.float32), ("standardise", torch.float64)])
def test_a_batch_brings_its_images_gathered_and_normalised_in_the_default_type(kind, dtype, monkeypatch):
    batch = next(iter(make(f"dataset.normalise={kind}").val_dataloader())).to("cpu")
    before = torch.get_default_dtype()
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)  # as the trainer's precision does in a step
    episodes, positions = batch.load(), batch.episodes
    monkeypatch.undo()
    assert torch.get_default_dtype() == before
    assert isinstance(positions, EpisodeIndex) and isinstance(episodes, Episode)
    assert torch.equal(episodes.support, normalise(BANK.images[positions.support], kind).to(dtype))
    assert torch.equal(episodes.query, normalise(BANK.images[positions.query], kind).to(dtype))
    assert torch.equal(episodes.query_labels, positions.query_labels) and episodes.way == positions.way
    assert episodes.support.shape == (5, 6, 3, 16, 16) and episodes.query.dtype == dtype
    bound = 1.0 if kind == "range" else 5.0
    assert 0.9 < episodes.query.max() <= bound


def test_to_iterate_a_loader_again_repeats_no_training_episode_and_to_look_at_one_trains_on_none():
    module = make("train.meta_batch=2")  # train.episodes=10, val.every=4
    loader = module.train_dataloader()
    epochs = [[tuple(number) for batch in loader for number in batch.share.numbers] for _ in range(4)]
    assert epochs == [[(0, n) for n in range(4)], [(1, n) for n in range(4)], [(2, 0), (2, 1)], []]
    broken_off = module.train_dataloader()
    assert [next(iter(broken_off)).share.start for _ in range(3)] == [0, 2, 4]
    assert module.trained == 0


def test_the_module_counts_what_a_trainer_takes_to_train_on():
    module = make("train.meta_batch=2", trainer=trainer_of(pieces=2))
    for first, second in ((0, 2), (2, 4), (4, 6), (6, 8), (8, 10)):
        if first == module.stage.stop:
            loader = iter(module.train_dataloader())
        for completes in (False, True):
            assert module.trained == first
            module.on_after_batch_transfer(next(loader), 0)
            assert module.step == range(first, second) and module.trainer.should_stop == (second == 10 and completes)
        assert module.trained == second
    module.trainer.training = False
    module.on_after_batch_transfer(next(iter(module.val_dataloader())), 0)
    assert module.trained == 10


def test_the_images_of_an_evaluation_are_those_of_all_its_episodes_on_every_process():
    loaders = [
        make("val.episodes=30", trainer=trainer_of(rank, processes)).val_dataloader()
        for rank, processes in ((0, 1), (0, 2), (1, 2))
    ]
    used = torch.cat([torch.cat([episode.support, episode.query]) for episode in single(loaders[0])]).unique()
    assert all(torch.equal(loader.positions(), used) for loader in loaders)
    assert [len(loader) for loader in loaders] == [2, 1, 1] == [len(list(loader)) for loader in loaders]


def test_the_bank_depends_on_the_settings_of_its_source_resolved_or_not(monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr(datamodule, "open_bank", lambda *arguments: asked.append(arguments) or BANK)
    source = {"_target_": "fewshot.data.glyphs.glyphs", "size": "${dataset.size}", "samples": 3, "seed": 0}
    config = OmegaConf.merge(compose("run_dir=x"), {"dataset": {"size": 16, "channels": 3, "source": source}})
    module = EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="somewhere")
    assert module.bank is BANK
    ((name, _, settings, cache_dir, _),) = asked
    assert (name, settings, cache_dir) == ("glyphs", source | {"size": 16}, "somewhere")


def test_what_is_odd_about_the_images_is_reported_in_a_line_each_by_one_process(monkeypatch, capsys):
    odd = replace(BANK, findings=("blank classes: a", "pictures twice: b\nc"))
    monkeypatch.setattr(datamodule, "open_bank", lambda *_: odd)
    monkeypatch.setattr(datamodule, "instantiate", lambda _: None)
    config = compose("run_dir=x", "dataset=omniglot", "dataset.size=16", "dataset.channels=3")
    modules = [EpisodeDataModule(config.dataset, **{key: config[key] for key in KEYS}, cache_dir="") for _ in "ab"]
    assert modules[0].bank is modules[0].bank is odd
    reported = "warning: omniglot: blank classes: a\nwarning: omniglot: pictures twice: b\\nc\n"
    assert capsys.readouterr().err == reported
    monkeypatch.setattr(datamodule.rank_zero_only, "rank", 1)
    assert modules[1].bank is odd
    assert capsys.readouterr().err == ""


def test_every_split_is_checked_before_training():
    with pytest.raises(FewShotError, match="way=6 is more than the 5 classes of the val split"):
        make("way=6")
    with pytest.raises(FewShotError, match=r"train\.way=9 is more than the 8 classes of the train split"):
        make("train.way=9")
    with pytest.raises(FewShotError, match=r"shot=2 and query=11 need 13 images .* of the val split has 12"):
        make("query=11", "train.query=4")


@pytest.mark.parametrize("kind", [EpisodeDataModule, partial(OneSplit, "val"), partial(OneSplit, "test")])
@pytest.mark.parametrize(("override", "message"), [("way=6", "way=6 is more than the"), ("query=9", "query=9 need 10")])
def test_a_task_that_the_classes_are_too_small_for_is_refused_before_an_image_is_read(
    tmp_path, monkeypatch, kind, override, message
):
    listed = [
        ImageClass(f"{split} {number}", split, count, lambda: pytest.fail("an image was read"))
        for split, number, count in product(SPLITS, range(5), [9])
    ]
    monkeypatch.setattr(datamodule, "instantiate", lambda _: Source([], lambda: listed))
    config = compose("run_dir=x", "train.way=5", "shot=1", "query=1", override)
    module = kind(config.dataset, **{key: config[key] for key in KEYS}, cache_dir=str(tmp_path))
    with pytest.raises(FewShotError, match=message):
        module.prepare_data()
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_a_small_class_that_may_be_left_out_of_an_evaluation_is_refused_only_if_it_is_not(tmp_path, monkeypatch):
    images = np.zeros((9, 4, 4, 1), np.uint8)
    listed = [
        ImageClass(f"{number}", "test", count, partial(images.__getitem__, slice(count)))
        for number, count in enumerate((9, 9, 2))
    ]
    monkeypatch.setattr(datamodule, "instantiate", lambda _: Source([], lambda: listed))
    config = compose("run_dir=x", "way=2", "shot=1", "query=2", "dataset.size=4")
    module = OneSplit("test", config.dataset, **{key: config[key] for key in KEYS}, cache_dir=str(tmp_path))
    module.prepare_data()
    with pytest.raises(FewShotError, match="need 3 images of each class, but 2 of the test split has 2"):
        module.setup()
    module.left_out = ["2"]
    module.setup()


def test_an_evaluation_of_nearly_all_images_of_a_split_embeds_all_of_them():
    loader, nearly = make("val.episodes=30").val_dataloader(), 0
    whole, _ = loader.dataset.bank.labelled("val")
    for episodes in range(1, 30):
        drawn = torch.cat([torch.cat([one.support, one.query]) for one in single(loader)[:episodes]]).unique()
        positions = EvaluationLoader(loader.dataset, episodes, loader.images).positions()
        assert torch.equal(positions, whole if len(drawn) >= 0.9 * len(whole) else drawn)
        nearly += 0.9 * len(whole) <= len(drawn) < len(whole)
    assert nearly


def test_images_of_another_size_than_configured_are_refused(cache_dir):
    config = compose("dataset=glyphs", f"cache_dir={cache_dir}")
    config.dataset.size = 20
    with pytest.raises(FewShotError, match=r"images of glyphs are \[28, 28, 1\], and .* say \[20, 20, 1\]"):
        make_data(config).bank  # noqa: B018
