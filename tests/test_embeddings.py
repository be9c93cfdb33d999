"""Embeddings, each computed once."""

import importlib
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from torchvision.models import get_model

from fewshot import embeddings
from fewshot.config import compose
from fewshot.embeddings import EmbeddingCache, EmbeddingTable, embed
from fewshot.evaluation import evaluate
from fewshot.methods import base
from fewshot.prediction import find_support, read_support
from fewshot.predictor import make_predictor

IMAGES = torch.randn(200, 3, 4, 4)
IMAGES_AT = torch.arange(0, 60, 3)


def strategy(rank=0, processes=1):
    return SimpleNamespace(global_rank=rank, world_size=processes, reduce=lambda tensor, **_: tensor)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 3)])
def test_embeddings_of_any_shape_are_found_by_their_positions(shape):
    positions = torch.arange(3, 200, 3)
    values = torch.randn(200, *shape)
    found = embed(lambda images: values[images[:, 0].long()], lambda at: at[:, None], positions, strategy())
    assert torch.equal(found, values[positions])
    asked = positions[torch.randint(len(positions), (2, 5))]
    assert torch.equal(EmbeddingTable(positions, found, 200)(asked), values[asked])


@pytest.mark.parametrize("processes", [2, 15])
def test_processes_share_out_the_images_to_embed(monkeypatch, processes):
    monkeypatch.setattr(embeddings, "EMBEDDED_TOGETHER", 8)
    batches = []

    def embedded(rank, processes):
        return embed(
            lambda images: batches.append(len(images)) or images.flatten(1),
            lambda positions: IMAGES[positions],
            torch.arange(0, 140, 2),
            strategy(rank, processes),
        )

    whole = embedded(0, 1)
    pieces = batches.copy()
    assert sum(pieces) == len(whole) == 70 and len(pieces) == 9
    batches.clear()
    assert torch.equal(sum(embedded(rank, processes) for rank in range(processes)), whole)
    assert sorted(batches) == sorted(pieces + [8] * max(0, processes - len(pieces)))


class TestCache:
    @pytest.fixture
    def counted(self):
        """Count how often the embeddings of some images are computed."""

        def call(cache, module, positions=IMAGES_AT):
            def compute():
                call.computed += 1
                return module(IMAGES[positions])

            before = call.computed
            found = cache(module, positions, compute)
            assert torch.equal(found, module(IMAGES[positions]))
            return call.computed - before

        call.computed = 0
        return call

    def test_embeddings_are_computed_once_for_equal_weights_images_and_settings(self, counted, tmp_path):
        module = Scaled()
        cache = EmbeddingCache(tmp_path / "new", {"precision": "32-true"})
        assert [counted(cache, module) for _ in range(3)] == [1, 0, 0]
        assert counted(EmbeddingCache(tmp_path / "new", {"precision": "32-true"}), Scaled()) == 0
        assert counted(cache, module, IMAGES_AT[:4]) == 1
        assert counted(EmbeddingCache(tmp_path / "new", {"precision": "64-true"}), module) == 1
        for name in ("factor", "mean"):  # a parameter, and a buffer that checkpoints leave out
            changed = Scaled()
            getattr(changed, name).data += 1
            assert counted(cache, changed) == 1

    def test_changed_code_is_noticed(self, counted, tmp_path, monkeypatch):
        cache, source = EmbeddingCache(tmp_path / "cache", None), tmp_path / "encoder.py"
        monkeypatch.setattr(embeddings.inspect, "getsourcefile", lambda _: str(source))
        source.write_text("first")
        assert [counted(cache, Scaled()) for _ in range(2)] == [1, 0]
        source.write_text("second")
        assert counted(cache, Scaled()) == 1

    def test_changed_code_that_an_encoder_imports_is_noticed(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "their_helper.py").write_text("def change(x): return x\n")
        (tmp_path / "their_encoder.py").write_text(
            "import torch, their_helper\n"
            "class Encoder(torch.nn.Module):\n"
            "    def forward(self, images): return their_helper.change(images).flatten(1)\n"
        )
        encoder = importlib.import_module("their_encoder").Encoder()
        cache, computed = EmbeddingCache(tmp_path / "cache", None), []
        for line in ("def change(x): return x\n", "def change(x): return -x\n"):
            (tmp_path / "their_helper.py").write_text(line)
            importlib.reload(importlib.import_module("their_helper"))
            for _ in range(2):
                found = cache(encoder, IMAGES_AT, lambda: computed.append(1) or encoder(IMAGES[IMAGES_AT]))
                assert torch.equal(found, encoder(IMAGES[IMAGES_AT]))
        assert len(computed) == 2

    def test_nothing_is_kept_of_code_that_is_in_no_file(self, counted, tmp_path, monkeypatch):
        def built_in(_):
            raise TypeError("built-in class")

        monkeypatch.setattr(embeddings.inspect, "getsourcefile", built_in)
        assert [counted(EmbeddingCache(tmp_path, None), Scaled()) for _ in range(2)] == [1, 1]

    def test_a_broken_file_is_replaced_and_a_folder_that_cannot_be_written_is_no_error(self, counted, tmp_path):
        cache = EmbeddingCache(tmp_path / "cache", None)
        counted(cache, Scaled())
        (file,) = (tmp_path / "cache").iterdir()
        file.write_bytes(b"broken")
        assert [counted(cache, Scaled()) for _ in range(2)] == [1, 0]
        (tmp_path / "file").write_text("")
        assert [counted(EmbeddingCache(tmp_path / "file", None), Scaled()) for _ in range(2)] == [1, 1]

    def test_the_embeddings_used_last_are_kept(self, counted, tmp_path, monkeypatch):
        cache, sizes = EmbeddingCache(tmp_path, None), range(3, 7)
        for size in sizes:
            counted(cache, Scaled(), IMAGES_AT[:size])
        for number, file in enumerate(sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_size)):
            os.utime(file, (number, number))
        counted(cache, Scaled(), IMAGES_AT[:3])  # the oldest is used again
        monkeypatch.setattr(embeddings, "KEPT", 3 * max(file.stat().st_size for file in tmp_path.iterdir()))
        counted(cache, Scaled(), IMAGES_AT[:7])
        assert [counted(cache, Scaled(), IMAGES_AT[:size]) for size in (7, 3, 6)] == [0, 0, 0]
        assert len(list(tmp_path.iterdir())) == 3

    def test_an_evaluation_of_the_same_weights_embeds_nothing(self, run, cache_dir, tmp_path, monkeypatch):
        def evaluated(*overrides):
            out = tmp_path / str(len(list(tmp_path.iterdir())))
            base = [f"checkpoint={run('protonet')}", f"cache_dir={tmp_path / 'cache'}", f"out={out}", "hardware=cpu"]
            return evaluate(compose(*base, "episodes=20", *overrides, name="evaluate"))

        shutil.copytree(cache_dir, tmp_path / "cache")
        first = evaluated(), evaluated("method=simpleshot")
        monkeypatch.setattr(base, "embed", forbidden)
        assert (evaluated(), evaluated("method=simpleshot")) == first
        assert 0 < evaluated("method=nearest_neighbour") < 1
        with pytest.raises(NotImplementedError):
            evaluated("split=val")


class TestCacheOfPhotos:
    @pytest.fixture
    def embedded(self, tmp_path):
        """Embed photos through the cache, and return how many were computed."""

        def call(photos, module=None):
            def compute(new):
                sizes.append(len(new))
                return module(new.float())

            module, sizes = module or Scaled(), []
            found = EmbeddingCache(tmp_path, "settings").each(module, photos, compute)
            assert torch.equal(found, module(photos.float()))
            return sum(sizes)

        return call

    PHOTOS = torch.randint(256, (6, 2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def test_only_new_photos_are_computed_in_any_order(self, embedded):
        assert embedded(self.PHOTOS[:4]) == 4
        assert embedded(self.PHOTOS[[5, 2, 1, 4, 2]]) == 2
        assert embedded(self.PHOTOS.flip(0)) == 1  # one is always computed: it shows the shape
        changed = Scaled()
        changed.factor.data += 1
        assert embedded(self.PHOTOS, changed) == 6

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda _: b"broken",
            pickle.dumps,
            lambda found: save({"embeddings": found["embeddings"]}),
            lambda found: save(found | {"digests": found["digests"][:2].contiguous()}),
            lambda found: save(found | {"digests": found["digests"][:, :5].contiguous()}),
            lambda found: save(found | {"embeddings": found["embeddings"][:, :3].contiguous()}),
            lambda found: save(found | {"embeddings": found["embeddings"].double()}),
            lambda found: save(found | {"embeddings": found["embeddings"] / 0}),
            lambda found: save(found | {"embeddings": torch.tensor(1.0)}),
        ],
    )
    def test_a_hostile_file_is_replaced(self, embedded, tmp_path, spoil):
        embedded(self.PHOTOS)
        (file,) = tmp_path.iterdir()
        file.write_bytes(spoil(load_file(file)))
        assert embedded(self.PHOTOS) >= 6
        assert embedded(self.PHOTOS) == 1

    def test_those_used_last_are_kept(self, embedded, monkeypatch):
        monkeypatch.setattr(embeddings, "KEPT_EACH", 3)
        assert [embedded(self.PHOTOS[:3]), embedded(self.PHOTOS[[0, 3]])] == [3, 1]
        assert embedded(self.PHOTOS[[0, 2, 3]]) == 1
        assert embedded(self.PHOTOS[:2]) == 1  # 1 was the one to go

    def test_predicting_again_embeds_only_new_examples(self, tmp_path, monkeypatch):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (tmp_path / "support" / name).mkdir(parents=True)
            Image.new("RGB", (30, 30), colour).save(tmp_path / "support" / name / "1.png")
        torch.save(get_model("mobilenet_v3_small", weights=None).state_dict(), tmp_path / "weights.pth")
        predictor = make_predictor(
            compose(
                "encoder=pretrained",
                "encoder.name=mobilenet_v3_small",
                f"encoder.file={tmp_path / 'weights.pth'}",
                "dataset.size=32",
                "hardware=cpu",
                f"cache_dir={tmp_path / 'cache'}",
                name="predict",
            )
        )
        sizes, represent = [], predictor.represent
        monkeypatch.setattr(predictor, "represent", lambda images: sizes.append(len(images)) or represent(images))

        def learned():
            support, _, _ = read_support(find_support(str(tmp_path / "support")), predictor.read, [])
            return predictor.learn(support).examples

        first, second = learned(), learned()
        torch.testing.assert_close(first, second)
        Image.new("RGB", (30, 30), (90, 200, 30)).save(tmp_path / "support" / "red" / "2.png")
        assert len(learned()) == 3 and sizes == [2, 1, 1]


def forbidden(*_):
    raise NotImplementedError


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, images):
        return (self.factor * images - self.mean).flatten(1).detach()
