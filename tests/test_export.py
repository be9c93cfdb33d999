"""Exporting an encoder as ONNX."""

import numpy as np
import pytest
import torch

from fewshot.config import compose
from fewshot.data.images import normalise
from fewshot.errors import FewShotError
from fewshot.export import export
from fewshot.trained import load_trained
from fewshot.training import train

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


def test_maml_and_a_missing_checkpoint_are_rejected(tmp_path, cache_dir):
    run_dir = tmp_path / "maml"
    train(compose(*TINY, "method=maml", "train.meta_batch=2", f"run_dir={run_dir}", f"cache_dir={cache_dir}"))
    with pytest.raises(FewShotError, match="cannot be used by itself"):
        export(str(run_dir), str(tmp_path / "encoder.onnx"))
    with pytest.raises(FewShotError, match="no checkpoint is given"):
        export(None, str(tmp_path / "encoder.onnx"))


def test_error_names_the_extra_for_missing_packages(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(FewShotError, match=r"onnxruntime is not installed; .* '\.\[export\]'"):
        export(str(run), str(tmp_path / "encoder.onnx"))
    assert not (tmp_path / "encoder.onnx").exists()
