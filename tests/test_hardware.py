"""What a GPU would be asked to do, on one that PyTorch only imagines; and options of the hardware that may fail."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_bank
from fewshot.config import compose
from fewshot.data.episodes import EpisodeIndex, MetaBatch, Share
from fewshot.training import make_data, make_method

BANK = make_bank({"train": [8] * 6, "val": [8] * 5, "test": [8] * 5}, size=28)
MAKE = [
    "way=3",
    "train.way=3",
    "train.query=4",
    "shot=2",
    "query=4",
    "train.meta_batch=2",
    "dataset=omniglot",
    "run_dir=unused",
]
METHODS = ["protonet", "matching", "matching_fce", "maml"]


class HostWatch(TorchDispatchMode):
    """Notes every operation for which the host would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        name = str(operation)
        devices = {of.device.type for of in (*args, found) if isinstance(of, torch.Tensor)}
        if "_local_scalar_dense" in name or "nonzero" in name or ("copy" in name and len(devices) > 1):
            self.waits.append(name)
        return found


@pytest.fixture
def data():
    module = make_data(compose(*MAKE))
    module._bank = BANK
    module.setup()
    return module


@pytest.mark.parametrize("room", [True, False])
def test_the_bank_lies_on_the_gpu_when_it_fits_and_is_carried_there_once(data, monkeypatch, room):
    free = 4 * BANK.images.nbytes + (1 if room else -1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    watch = HostWatch()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        positions = {
            "support": torch.zeros((2, 6), dtype=torch.int64),
            "query": torch.zeros((2, 12), dtype=torch.int64),
        }
        batch = EpisodeIndex(**positions, support_labels=positions["support"], query_labels=positions["query"], way=3)
        for _ in range(2):
            with watch:
                episodes = batch.load(data.images)
    assert episodes.support.device.type == episodes.query.device.type == "cuda"
    assert episodes.support.shape == (2, 6, 1, 28, 28)
    assert (data.images._resident is not None) == room
    # Once for the bank, or each of two times for support and query: the positions there, the images back.
    assert len(watch.waits) == (1 if room else 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_never_asks_for_a_number_on_the_host(method):
    model = make_method(compose(*MAKE, f"method={method}", *(["method.task_batching=vmap"] * (method == "maml"))))
    model.log_training = lambda *_: None  # it takes a trainer
    images = torch.rand(36, 1, 28, 28)
    positions = EpisodeIndex(
        support=torch.arange(12).view(2, 6),
        support_labels=torch.arange(3).repeat(2, 2),
        query=torch.arange(12, 36).view(2, 12),
        query_labels=torch.arange(3).repeat(2, 4),
        way=3,
    )
    meta_batch = MetaBatch(positions, Share([], 0.5), lambda positions: images[positions])
    with HostWatch() as watch:
        if method == "maml":
            model.meta_gradient(meta_batch.load())
        else:
            model.training_step(meta_batch, 0).backward()
    assert not watch.waits


def test_where_nothing_can_be_compiled_the_run_goes_on_as_it_is(cli, tmp_path):
    tiny = ["train.episodes=4", "train.way=3", "val.every=4", "val.episodes=3", "test.episodes=5", "hardware=cpu"]
    found = []
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        run_dir = tmp_path / name
        environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        done = cli(*tiny, f"hydra.run.dir={run_dir}", f"hardware.compile={compiled}", env=environment)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name])
