"""The data module and the methods used as a library, with a user's own trainer."""

import pytest
import pytorch_lightning as pl
import torch

from fewshot.config import compose
from fewshot.training import make_data, make_method, train

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = {"protonet": [], "maml": ["train.meta_batch=2"]}
SMALL = ["train.episodes=10", "train.way=5", "query=3", "val.every=4", "val.episodes=3", "test.episodes=3"]
SMALL += ["encoder.filters=8", "hardware=cpu"]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Episodes(pl.Callback):
    """Records the training episodes and the number of validations."""

    def __init__(self):
        self.numbers, self.validations = [], 0

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):  # noqa: ARG002
        self.numbers += [tuple(number) for number in batch.share.numbers]

    def on_validation_end(self, trainer, method):  # noqa: ARG002
        self.validations += not trainer.sanity_checking


@pytest.fixture
def parts(tmp_path, cache_dir):
    """A new method and a new data module."""

    def make(name):
        places = [f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}"]
        config = compose(f"method={name}", *METHODS[name], *SMALL, *places)
        return config, make_method(config), make_data(config)

    return make


def same(method, other):
    torch.testing.assert_close(dict(method.named_parameters()), dict(other.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_they_train_as_in_our_trainer_and_no_episode_is_repeated(parts, tmp_path, name):
    config, method, data = parts(name)
    seen = Episodes()
    trainer = pl.Trainer(max_epochs=100, callbacks=[seen], enable_checkpointing=False, **QUIET)
    trainer.fit(method, data)
    assert seen.numbers == [(0, n) for n in range(4)] + [(1, n) for n in range(4)] + [(2, 0), (2, 1)]
    assert seen.validations == 3 and data.trained == 10
    train(config)
    ours = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(method.state_dict(), ours, rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_loaders_alone_train_on_the_same_episodes(parts, name):
    _, expected, data = parts(name)
    pl.Trainer(max_epochs=3, enable_checkpointing=False, **QUIET).fit(expected, data)
    _, method, data = parts(name)
    data.setup()
    seen = Episodes()
    trainer = pl.Trainer(max_epochs=3, callbacks=[seen], enable_checkpointing=False, **QUIET)
    trainer.fit(method, data.train_dataloader(), data.val_dataloader())
    assert len(set(seen.numbers)) == len(seen.numbers) == 10
    same(method, expected)
    (result,) = trainer.test(method, data.test_dataloader(), verbose=False)
    assert 0 <= result["test/accuracy"] <= 1


@pytest.mark.parametrize("every_n_steps", [None, 3])
def test_a_resumed_training_ends_like_an_uninterrupted_one(parts, tmp_path, every_n_steps):
    _, expected, data = parts("protonet")
    pl.Trainer(max_epochs=100, enable_checkpointing=False, **QUIET).fit(expected, data)
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path / "own", save_top_k=-1, every_n_train_steps=every_n_steps, filename="{step}"
    )
    _, method, data = parts("protonet")
    pl.Trainer(max_epochs=2, callbacks=[keep], **QUIET).fit(method, data)
    path = tmp_path / "own" / f"step={every_n_steps or 4}.ckpt"
    _, method, data = parts("protonet")
    seen = Episodes()
    trainer = pl.Trainer(max_epochs=100, callbacks=[seen], enable_checkpointing=False, **QUIET)
    trainer.fit(method, data, ckpt_path=path, weights_only=True)
    assert len(seen.numbers) == 10 - (every_n_steps or 4) and len(set(seen.numbers)) == len(seen.numbers)
    same(method, expected)
