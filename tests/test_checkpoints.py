"""Checkpoints: written atomically, and harmless even if untrusted."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot.checkpoints import load_checkpoint, write_atomically
from fewshot.config import compose
from fewshot.errors import FewShotError
from fewshot.training import train


@pytest.fixture(scope="module")
def good(tmp_path_factory, cache_dir):
    """A checkpoint of this program, as bytes."""
    here = tmp_path_factory.mktemp("run")
    tiny = ["train.episodes=2", "train.way=3", "val.episodes=2", "test.episodes=2", "encoder.filters=4"]
    train(compose(*tiny, f"run_dir={here}", f"cache_dir={cache_dir}"))
    return (here / "checkpoints" / "last.ckpt").read_bytes()


def content(good):
    return torch.load(io.BytesIO(good), weights_only=True)


def refused(path, expected):
    with pytest.raises(FewShotError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and expected in message and "\n" not in message


def loads_or_is_refused(path):
    message = ""
    try:
        load_checkpoint(path)
    except FewShotError as error:
        message = str(error)
    assert "\n" not in message


def test_a_good_checkpoint_is_read(good, tmp_path):
    (tmp_path / "good.ckpt").write_bytes(good)
    assert set(load_checkpoint(tmp_path / "good.ckpt")) == set(content(good))


class Exploit:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch_old"])
def test_a_checkpoint_that_would_run_code_is_rejected_and_runs_nothing(good, tmp_path, how):
    flag, path = tmp_path / "run", tmp_path / "evil.ckpt"
    evil = content(good) | {"callbacks": Exploit(f"touch {flag}")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "torch")
    refused(path, "not a checkpoint of this program")
    assert not flag.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert flag.exists()  # loading it unsafely runs the code


@pytest.mark.parametrize("target", ["os.system", "fewshot.cli.os.system", "fewshot.config.compose", "builtins.eval"])
@pytest.mark.parametrize("keys", [("method",), ("encoder",), ("dataset", "source"), ("method", "distance")])
def test_a_configuration_with_unknown_targets_is_rejected(good, tmp_path, target, keys):
    evil = content(good)
    node = evil["hyper_parameters"]
    for key in keys:
        node = node[key]
    node["_target_"] = target
    torch.save(evil, tmp_path / "evil.ckpt")
    refused(tmp_path / "evil.ckpt", f"is {target}, which ")


@pytest.mark.parametrize("damage", ["empty", "short", "text", "zip", "tensor", "no weights", "no configuration"])
def test_a_broken_or_foreign_file_is_named(good, tmp_path, damage):
    path = tmp_path / "file.ckpt"
    whole = content(good)
    if damage == "tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif damage == "no weights":
        torch.save({**whole, "state_dict": 3}, path)
    elif damage == "no configuration":
        del whole["hyper_parameters"]
        torch.save(whole, path)
    else:
        path.write_bytes({"empty": b"", "short": good[: len(good) // 2], "text": b"hello, world\n"}[damage])
    refused(path, str(path))
    with pytest.raises(FewShotError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("${oc.env:HOME}"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.just("_target_"), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["method", "encoder", "dataset", "way", "train", "other"]), plain))
def test_any_configuration_in_a_checkpoint_is_accepted_or_rejected_in_one_line(good, tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    whole = content(good)
    whole["hyper_parameters"] |= changes
    torch.save(whole, path)
    loads_or_is_refused(path)


@settings(deadline=None)
@given(data=st.data())
def test_any_damage_is_rejected_in_one_line_or_harmless(good, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    at = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=20)) + good[at + data.draw(st.integers(0, 20)) :])
    loads_or_is_refused(path)


def test_a_file_is_written_completely_or_stays_unchanged(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    with Path("/dev/full").open("wb") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdopen", lambda *_: full)
        with pytest.raises(FewShotError, match=f"cannot write {path}: No space left on device; .*: free some"):
            write_atomically(path, bytes(10**6))
    assert path.read_bytes() == b"first"
    with pytest.raises(FewShotError, match=r"deep: Is a directory; .* is kept: name a path that is writable$"):
        write_atomically(path.parent, b"second")
    assert path.read_bytes() == b"first"


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(good, tmp_path):
    whole = content(good)
    whole["hyper_parameters"]["method"]["learning_rate"] = 0.001
    torch.save(whole, tmp_path / "old.ckpt")
    with pytest.raises(FewShotError, match=r"old\.ckpt is from an earlier version of fewshot, which had method\.learn"):
        load_checkpoint(tmp_path / "old.ckpt")
