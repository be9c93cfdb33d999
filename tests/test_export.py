"""Exporting an encoder as ONNX, and weights to share."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fewshot.checkpoints import read_weights, save_weights
from fewshot.commands import COMMANDS
from fewshot.config import compose
from fewshot.data.contents import contents_of
from fewshot.data.images import normalise
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.export import export
from fewshot.trained import load_trained
from fewshot.training import make_data, train

TINY = ["train.episodes=2", "train.way=5", "val.episodes=2", "test.episodes=2", "encoder.filters=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    run_dir = tmp_path_factory.mktemp("run")
    train(compose(*TINY, f"run_dir={run_dir}", f"cache_dir={cache_dir}"))
    return run_dir


def test_exported_encoder_matches_pytorch(run, tmp_path, capsys):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} of the extra export is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime of the extra export is not installed")
    assert 0 <= export(str(run), str(tmp_path / "encoder.onnx")) < 1e-4
    assert "uint8 [images, 28, 28, 1]" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1), dtype=np.uint8)
    with torch.no_grad():
        expected = load_trained(str(run)).method.encoder(normalise(torch.from_numpy(pixels), "range"))
    (found,) = session.run(["embeddings"], {"pixels": pixels})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["protonet", "maml"])
def test_shared_weights_stand_for_the_checkpoint(run, method, tmp_path, cache_dir, capsys):
    if method == "maml":
        run = tmp_path / "maml"
        train(compose(*TINY, "method=maml", "train.meta_batch=2", f"run_dir={run}", f"cache_dir={cache_dir}"))
    shared = tmp_path / "shared" / "weights.safetensors"
    assert export(str(run), str(shared)) == 0
    shown = capsys.readouterr().out
    assert hashlib.sha256(shared.read_bytes()).hexdigest() in shown and "weights and configuration" in shown
    with safe_open(shared, framework="pt") as file:
        assert str(tmp_path.parent) not in file.metadata()["fewshot"]  # no directories of this machine

    def tested(place):
        out = tmp_path / "evaluations" / Path(place).name
        settings = [f"checkpoint={place}", f"cache_dir={cache_dir}", f"out={out}", "episodes=5", "hardware=cpu"]
        return evaluate(compose(*settings, name="evaluate"))

    assert tested(shared) == tested(run)
    again = tmp_path / "again.safetensors"
    export(str(shared), str(again))
    assert again.read_bytes() == shared.read_bytes()


def test_weights_in_a_run_are_evaluated_with_its_overrides(run, tmp_path, cache_dir):
    shared, record = tmp_path / "run" / "weights.safetensors", tmp_path / "run" / ".hydra" / "overrides.yaml"
    record.parent.mkdir(parents=True)
    record.write_text("- optimizer.lr=0.5\n")
    export(str(run), str(shared))
    settings = [f"checkpoint={shared}", f"cache_dir={cache_dir}", f"out={tmp_path / 'out'}", "hardware=cpu"]
    evaluate(compose(*settings, name="evaluate"))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["overrides"] == ["optimizer.lr=0.5"]


def test_an_encoder_starts_from_shared_weights_unless_they_know_its_test_classes(run, tmp_path, cache_dir):
    shared = tmp_path / "weights.safetensors"
    export(str(run), str(shared))
    settings = [*TINY, f"encoder.init={shared}", f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}"]
    train(compose(*settings))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["encoder_init"]["sha256"] == hashlib.sha256(shared.read_bytes()).hexdigest()
    content, weights, _ = read_weights(shared)
    bank = make_data(compose(f"cache_dir={cache_dir}")).bank
    content["data"] = contents_of(bank.with_validation_in_training()).pack()
    save_weights(shared, weights, content)
    with pytest.raises(FewShotError, match=r"was trained on .* of the val classes"):
        train(compose(*settings, f"run_dir={tmp_path / 'other'}"))


def test_a_damaged_or_newer_file_of_weights_is_one_line(run, tmp_path):
    shared = tmp_path / "weights.safetensors"
    export(str(run), str(shared))
    content, weights, _ = read_weights(shared)
    save_weights(shared, weights, {**content, "format": 2})
    with pytest.raises(FewShotError, match=r"has format 2, and this version reads 1: install a newer version"):
        load_trained(str(shared))
    save_weights(shared, {**weights, "other": torch.ones(3)}, content)
    with pytest.raises(FewShotError, match=r"do not fit .*other is \[3\]"):
        load_trained(str(shared))
    shared.write_bytes(shared.read_bytes()[:-9])
    with pytest.raises(FewShotError, match=r"weights\.safetensors is broken, or holds no weights saved by"):
        load_trained(str(shared))
    with pytest.raises(FewShotError, match=r"there is no checkpoint .*nothing\.safetensors"):
        load_trained(str(tmp_path / "nothing.safetensors"))


def test_maml_and_a_missing_checkpoint_are_rejected(tmp_path, cache_dir):
    run_dir = tmp_path / "maml"
    train(compose(*TINY, "method=maml", "train.meta_batch=2", f"run_dir={run_dir}", f"cache_dir={cache_dir}"))
    with pytest.raises(FewShotError, match="cannot be used by itself"):
        export(str(run_dir), str(tmp_path / "encoder.onnx"))
    with pytest.raises(FewShotError, match="no checkpoint is given"):
        export(None, str(tmp_path / "encoder.onnx"))
    both = ["checkpoint=/a", "model=/b.fewshot", f"out={tmp_path / 'encoder.onnx'}"]
    with pytest.raises(FewShotError, match=r"^checkpoint=/a: model=/b\.fewshot decides that; remove one of them$"):
        COMMANDS["export"](compose(*both, name="export"))


def test_error_names_the_extra_for_missing_packages(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(FewShotError, match=r"onnxruntime is not installed; .* '\.\[export\]'"):
        export(str(run), str(tmp_path / "encoder.onnx"))
    assert not (tmp_path / "encoder.onnx").exists()


@pytest.mark.parametrize("name", ["weights.txt", "weights.pt", "weights"])
def test_another_ending_is_refused(run, tmp_path, name):
    with pytest.raises(FewShotError, match=r"choose out=FILE\.onnx for the encoder, or out=FILE\.safetensors"):
        export(str(run), str(tmp_path / name))
