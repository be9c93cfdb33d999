"""Untrusted files: whatever they contain, no code runs, and nothing of the user's is revealed or overwritten."""

import copy
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf.basecontainer import BaseContainer

import fewshot.trust
from conftest import FUZZ, FUZZ_TESTS, nothing_touched
from fewshot.callbacks import _move
from fewshot.checkpoints import load_checkpoint, save_weights
from fewshot.cli import _explain
from fewshot.config import check, compose, without_initial_weights
from fewshot.errors import FewShotError
from fewshot.evaluation import task_of
from fewshot.files import write_atomically
from fewshot.runs import complete_results, load_for_resume, overrides
from fewshot.trained import load_trained
from fewshot.training import train
from fewshot.trust import GROUPS, KnownTargets, default_directories, plain, read_config

SECRET = "fewshot-canary-7391"  # in the user's environment
TINY = ["train.episodes=2", "train.way=3", "val.episodes=2", "test.episodes=2", "encoder.filters=4", "hardware=cpu"]
fired: list[Any] = []


def fire(*arguments: Any, **keywords: Any) -> None:
    """The function that no file may ever call."""
    fired.append((arguments, keywords))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, cache_dir):  # noqa: ARG001
    """A complete run."""
    here = tmp_path_factory.mktemp("run")
    train(compose(*TINY, f"run_dir={here}"))
    return here


@pytest.fixture(scope="module")
def good(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def read(run_dir, tmp_path_factory):
    """Gives a checkpoint with some configuration to every reader; returns their errors or what they would use."""
    there = tmp_path_factory.mktemp("stranger")
    (there / "checkpoints").mkdir()
    (there / "checkpoints" / "best.ckpt").symlink_to("last.ckpt")
    whole = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    evaluating = compose(name="evaluate")
    evaluating.hardware.precision = "32-true"
    resuming = {
        "resume": compose(*TINY, f"run_dir={there}", f"resume={there}"),
        "auto": compose(*TINY, f"run_dir={there}", "resume=auto"),
    }

    def evaluate():
        requested = task_of(load_trained(str(there)).config, evaluating)
        check(requested)
        return requested

    def resume(which):
        config, _ = load_for_resume(resuming[which].copy())
        check(config)
        instantiate(without_initial_weights(config.method))
        return config

    readers = {
        "predict": lambda: vars(load_trained(str(there))),
        "evaluate": evaluate,
        "resume": lambda: resume("resume"),
        "auto": lambda: resume("auto"),
        "shared": lambda: vars(load_trained(str(there / "shared.safetensors"))),
    }

    def outcomes_of(config):
        torch.save({**whole, "hyper_parameters": config}, there / "checkpoints" / "last.ckpt")
        used = dict(readers)
        try:
            save_weights(there / "shared.safetensors", whole["state_dict"], {"config": config})
        except (TypeError, ValueError):  # not JSON
            del used["shared"]
        outcomes = {}
        for name, reader in used.items():
            try:
                with nothing_touched():
                    outcomes[name] = reader()
            except Exception as error:
                outcomes[name] = _explain(error)
                if outcomes[name] is None:
                    raise
                assert "\n" not in outcomes[name]
        return outcomes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSHOT_CANARY", SECRET)
        known, places = KnownTargets(), default_directories()  # read once, since the files stay the same
        patch.setattr(fewshot.trust, "default_directories", lambda: places)
        patch.setattr(fewshot.trust, "KnownTargets", lambda own=None: known_to(known, own))
        yield outcomes_of


def known_to(known, own):
    known = copy.copy(known)
    known._own = {(slot, str(node["_target_"])): node for slot, node in known.targets(own)}
    return known


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every mapping and value in a configuration."""
    below = [at for key, value in node.items() for at in paths(value, (*path, key))] if isinstance(node, dict) else []
    return [path, *below] if path else below


def put(config, path, value):
    changed = copy.deepcopy(config)
    node = changed
    for key in path[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else {}
    node[path[-1]] = value
    return changed


TARGETS = [
    *("os.system", "subprocess.run", "builtins.eval", "test_trust.fire", "fewshot.cli.os.system", "torch.load"),
    *("fewshot.config.compose", "fewshot.data.omniglot.omniglot", "fewshot.trained.load_trained", "hydra.utils.call"),
    *("fewshot.distances.l2", "pathlib.Path", "functools.partial", "sys.modules.update", "figures.runs.episode"),
]
CALL = "{_target_: test_trust.fire, command: touch canary}"
TEXTS = [
    *("${oc.env:FEWSHOT_CANARY}", f"${{oc.create:{CALL}}}", f"${{oc.decode:'{CALL}'}}", f"${{oc.create:'{CALL}'}}"),
    *(f"${{oc.dict.values:${{oc.create:{CALL}}}}}", "${oc.decode:${oc.env:FEWSHOT_CANARY}}", "${method}", "${.}", "${"),
    *(CALL, "_target_: test_trust.fire", "&a " + CALL, "{a: &a " + CALL + ", b: *a}", "!!python/name:test_trust.fire"),
    *("!!python/object/apply:test_trust.fire []", "???", "\\${oc.env:FEWSHOT_CANARY}", "a ${oc.env:FEWSHOT_CANARY} b"),
    *("/dev/stdin", "/etc/passwd", "../../x", "$FEWSHOT_CANARY", "%(x)s", "[bold]", "\x1b[2J", "\n", "a: b\n- c"),
]
RESOLVERS = sorted(BaseContainer._resolvers)
ARGUMENTS = [CALL, f"'{CALL}'", "FEWSHOT_CANARY"]
texts = (
    st.sampled_from(TEXTS)
    | st.builds("${{{}:{}}}".format, st.sampled_from(RESOLVERS), st.sampled_from(ARGUMENTS))
    | st.text(max_size=8)
)
hydra_keys = st.dictionaries(
    st.sampled_from(["_target_", "_args_", "_partial_", "_convert_", "_recursive_", "_x_", "command", "file"]),
    st.sampled_from(TARGETS) | st.booleans() | st.just("all") | texts | st.lists(texts, max_size=2),
    max_size=4,
)
calls = st.builds(lambda target, keys: {"_target_": target, **keys}, st.sampled_from(TARGETS), hydra_keys)
numbers = st.sampled_from([0, -1, 60_000, 2**40, 10**30, float("nan"), float("inf"), 1e300, True, None])
payloads = st.recursive(
    texts | calls | numbers | hydra_keys | st.binary(max_size=3) | st.just(torch.zeros(2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["encoder", "distance", "_target_"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def harmless(outcomes):
    assert not fired
    for reader, content in outcomes.items():
        assert SECRET not in repr(content), reader


@settings(max_examples=max(FUZZ // FUZZ_TESTS, 60))
@given(data=st.data())
@pytest.mark.slow
def test_no_hostile_configuration_runs_code_or_reads_the_environment(good, read, data):
    config = good["hyper_parameters"]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths(config)))
        if data.draw(st.booleans()) and isinstance(config, dict):
            path = (*path[:-1], data.draw(st.sampled_from(["new", "_target_", "_args_", "encoder", "file"])))
        config = put(config, path, data.draw(payloads))
    harmless(read(config))


@pytest.mark.parametrize("resolver", RESOLVERS)
def test_no_resolver_is_ever_called(good, read, resolver):
    for inside in ARGUMENTS:
        for path in (("method",), ("method", "distance"), ("dataset", "source", "size")):
            outcomes = read(put(good["hyper_parameters"], path, f"${{{resolver}:{inside}}}"))
            harmless(outcomes)
            assert all(type(outcome) is str for outcome in outcomes.values())


def test_every_reader_accepts_a_good_configuration(good, read):
    assert not any(type(outcome) is str for outcome in read(good["hyper_parameters"]).values())


@pytest.mark.parametrize("text", [text for text in TEXTS if "fire" in text])
@pytest.mark.parametrize("path", [(), ("method",), ("method", "encoder"), ("dataset", "source")])
def test_text_is_never_read_as_a_mapping(good, read, text, path):
    outcomes = read(put(good["hyper_parameters"], path, text) if path else text)
    harmless(outcomes)
    assert all(type(outcome) is str for outcome in outcomes.values())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("method", "distance", "_target_"), "fewshot.data.omniglot.omniglot", "its distance is fewshot.data.omniglot"),
        (("dataset", "source", "_target_"), "fewshot.distances.l2", "which can only be a distance"),
        (("encoder", "_target_"), "os.system", "its encoder is os.system, which no configuration file names"),
        (("method", "distance", "_target_"), "mine.far", "trust its package with trust=mine, or name the directory"),
        (
            ("hardware", "strategy"),
            {"_target_": "test_trust.fire"},
            "code that is not trusted: its hardware.strategy is",
        ),
        (("method", "_args_"), [1], "its method has the key _args_"),
        (("method", "encoder", "_recursive_"), False, "its encoder has the key _recursive_"),
        (("dataset", "_convert_"), "all", "the key _convert_ in a node without _target_"),
        (("dataset", "size"), 60_000, "its dataset.size is 60000, more than 1,024"),
        (("dataset", "source", "samples"), 10**9, "its dataset.source.samples is 1000000000"),
        (("test", "episodes"), 10**12, "its test.episodes is 1000000000000"),
        (("dataset", "channels"), 2, "its dataset.channels is 2"),
        (("method", "encoder", "filters"), 10**6, "encoder.0.0.weight is [4, 1, 3, 3], and must be [1000000, 1, 3, 3]"),
        (
            ("method", "encoder"),
            {
                **{"_target_": "fewshot.encoders.pretrained.Pretrained", "name": "mobilenet_v2", "weights": None},
                "inverted_residual_setting": [[1, 1, 2**40, 1]],
            },
            "its configuration describes more layers than its",
        ),
        (("dataset", "source", "size"), 60_000, "its dataset.source.size is not its dataset.size, 28"),
        (("method", "steps"), 10**9, "its method.steps is 1000000000, more than 10,000"),
        (("method", "distance"), "{_target_: test_trust.fire}", "its method.distance is '{_target_: test_trust.fire}'"),
        (("method", "distance"), None, "its method.distance is None, which has no _target_"),
        (("method", "encoder"), ["text"], "its method.encoder is ['text'], which has no _target_"),
        (("seed",), 2**70, "a number of more than 64 bits"),
        (("way",), {1.5: 2}, "a key that is not a string"),
        (("way",), b"x", "a bytes, which is not plain data"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_reported(good, read, path, value, message):
    outcomes = read(put(good["hyper_parameters"], path, value))
    harmless(outcomes)
    assert message in outcomes["predict"]
    assert all(type(outcome) is str for outcome in outcomes.values())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", ["text", 3, 1.5, True, ["text"]])
def test_a_group_is_a_mapping_or_null(good, read, group, value):
    outcomes = read(put(good["hyper_parameters"], (group,), value))
    harmless(outcomes)
    assert all(f"its {group} is not a mapping" in outcome for outcome in outcomes.values())


def test_a_configuration_that_grows_or_never_ends_is_refused():
    bomb: list[Any] = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(ValueError, match="too large"):
        plain({"way": bomb})
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(ValueError, match="too large"):
        plain(endless)


def test_the_checked_copy_is_what_is_used(good):
    config = read_config(good["hyper_parameters"], Path("x.ckpt"))
    assert config["method"] == good["hyper_parameters"]["method"]
    assert config["method"] is not good["hyper_parameters"]["method"]


def test_the_users_directories_take_precedence(good, tmp_path):
    theirs = copy.deepcopy(good["hyper_parameters"]) | {"data_dir": "/etc", "cache_dir": "/etc", "run_dir": "/etc"}
    theirs["dataset"]["source"] = {
        "_target_": "fewshot.data.folder.folder",
        **{"data_dir": "/etc", "size": 28, "channels": 1, "val": 0.2, "test": 0.2, "split_seed": 0},
    }
    theirs["encoder"] = theirs["method"]["encoder"] = {
        "_target_": "fewshot.encoders.pretrained.Pretrained",
        **{"name": "resnet18", "weights": "DEFAULT", "file": "/etc/passwd", "frozen": True},
    }
    torch.save({**good, "hyper_parameters": theirs}, tmp_path / "theirs.ckpt")
    places = {"data_dir": "/mine/data", "cache_dir": "/mine/cache"}
    config = load_checkpoint(tmp_path / "theirs.ckpt", places=places)["hyper_parameters"]
    assert "/etc" not in json.dumps(config)
    assert config["dataset"]["source"]["data_dir"] == config["data_dir"] == "/mine/data"
    assert config["cache_dir"] == "/mine/cache" and config["encoder"]["file"] is config["run_dir"] is None


@pytest.mark.parametrize("trust", ["os", ["sys"], "fewshot", "../x", "a b", [3], 3])
def test_what_cannot_be_trusted_is_reported(good, tmp_path, trust):
    torch.save(good, tmp_path / "x.ckpt")
    with pytest.raises(FewShotError, match="trust="):
        load_checkpoint(tmp_path / "x.ckpt", trust=trust)


def test_trust_reaches_no_further_than_the_package(good, tmp_path):
    theirs = put(good["hyper_parameters"], ("method", "distance"), {"_target_": "test_trust.os.system"})
    torch.save({**good, "hyper_parameters": theirs}, tmp_path / "x.ckpt")
    with pytest.raises(FewShotError, match=r"its distance is test_trust\.os\.system, which test_trust has from posix"):
        load_checkpoint(tmp_path / "x.ckpt", trust="test_trust")


def test_what_takes_more_memory_than_disk_is_refused(good, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({**good, "state_dict": {"encoder.0.0.weight": torch.zeros(1).expand(10**9)}}, path)
    with pytest.raises(FewShotError, match="contains no weights"):
        load_checkpoint(path)
    torch.save(good, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "small.ckpt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    with pytest.raises(FewShotError, match="it is compressed"):
        load_checkpoint(tmp_path / "small.ckpt")


@pytest.mark.parametrize(
    "callbacks",
    [
        "text",
        {"\x1b]0;name": {}},
        {"Record": "text"},
        *({"Record": {key: "text"}} for key in ("seconds", "validations", "precisions", "encoder_init")),
        {"Record": {"validations": [{"trained_episodes": 1, "accuracy": 0.5, "ci95": torch.zeros(2)}]}},
        {"Record": {"validations": [{"trained_episodes": 1, "accuracy": float("nan")}]}},
        {"Record": {"precisions": [torch.zeros(2)]}},
    ],
    ids=str,
)
def test_a_record_that_no_training_saves_is_refused(good, tmp_path, callbacks):
    torch.save({**good, "callbacks": callbacks}, tmp_path / "x.ckpt")
    with pytest.raises(FewShotError, match=r"x\.ckpt is broken, .*: its (callbacks|Record)"):
        load_checkpoint(tmp_path / "x.ckpt")
    if "tensor(" not in str(callbacks):
        content = {"config": good["hyper_parameters"], "callbacks": callbacks}
        save_weights(tmp_path / "x.safetensors", good["state_dict"], content)
        with pytest.raises(FewShotError, match=r"x\.safetensors is broken, .*: its (callbacks|Record)"):
            load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "convert",
    [
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to(torch.float8_e5m2),
        lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda tensor: tensor.to_sparse(),
    ],
)
def test_weights_are_real_numbers(good, tmp_path, convert):
    weights = {name: convert(tensor) for name, tensor in good["state_dict"].items()}
    torch.save({**good, "state_dict": weights}, tmp_path / "x.ckpt")
    with pytest.raises(FewShotError, match="it contains no weights"):
        load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("key", ["callbacks", "loops", "optimizer_states", "lr_schedulers", "unknown"])
def test_containers_that_grow_when_they_are_copied_are_refused(good, tmp_path, key):
    bomb: list[Any] = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    endless: list[Any] = []
    endless.append(endless)
    for content in (bomb, endless):
        torch.save({**good, key: {"x": content}}, tmp_path / "x.ckpt")
        with pytest.raises(
            FewShotError, match=r"x\.ckpt is broken, .*: its containers are nested too deeply, or there"
        ):
            load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "fifo"])
def test_an_irregular_file_does_not_block(tmp_path, name):
    path = tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
    elif not Path(name).exists():
        pytest.skip(f"no {name}")
    with pytest.raises(FewShotError, match=f"{path} is broken"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("- seed=1\n- way=${oc.env:FEWSHOT_CANARY}\n", ["seed=1", "way=${oc.env:FEWSHOT_CANARY}"]),
        ("- !!python/object/apply:test_trust.fire []\n", []),
        ("a: &a [*a]\n", []),
        ("- &a [x]\n- *a\n", []),
        ("- {a: b}\n", []),
        ("[" * 5000, []),
        ("${oc.create:{}}", []),
        (b"\xff\xfe\x00", []),
    ],
)
def test_overrides_are_strings(tmp_path, monkeypatch, capsys, content, found):
    monkeypatch.setenv("FEWSHOT_CANARY", SECRET)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert overrides(tmp_path) == found
    assert ("skipped" in capsys.readouterr().err) == (not found)
    assert not fired


@pytest.mark.parametrize("value", [*TEXTS[:6], ["${oc.env:FEWSHOT_CANARY}"], {"_target_": "${oc.env:FEWSHOT_CANARY}"}])
@pytest.mark.parametrize("key", [None, "seed", "method"])
def test_results_are_data(run_dir, tmp_path, monkeypatch, key, value):
    monkeypatch.setenv("FEWSHOT_CANARY", SECRET)
    results = json.loads((run_dir / "results.json").read_text())
    results["config"] = value if key is None else results["config"] | {key: value}
    (tmp_path / "results.json").write_text(json.dumps(results))
    config = compose(*TINY, f"run_dir={tmp_path}")
    with pytest.raises(FewShotError, match=r"results.json is broken") as caught:
        complete_results(config)
    assert SECRET not in str(caught.value) and not fired


def test_results_in_a_pipe_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(FewShotError, match="it is not a regular file"):
        complete_results(compose(*TINY, f"run_dir={tmp_path}"))


@pytest.mark.parametrize("planted", ["file.partial", "file"])
def test_nothing_is_written_through_a_link(tmp_path, planted):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / planted).symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "file.partial").exists()


@pytest.mark.parametrize("folder", ["checkpoints", "tensorboard"])
def test_a_run_whose_directories_are_links_is_not_resumed(good, tmp_path, folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / folder).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    torch.save(good, tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(FewShotError, match=f"{folder} is a link"):
        load_for_resume(compose(*TINY, f"run_dir={tmp_path / 'run'}", "resume=auto"))


def test_a_checkpoint_names_no_file_to_remove(tmp_path):
    state = {
        **{"best_model_score": 0.5, "dirpath": "/x", "kth_value": 0.5, "current_score": 0.5},
        **{"best_model_path": "/etc/passwd", "kth_best_model_path": "/x/..", "last_model_path": ""},
        "best_k_models": {"/etc": 0.5, "/home": 0.6},
    }
    _move(state, SimpleNamespace(dirpath=str(tmp_path), filename="best"))
    assert state["best_k_models"] == {str(tmp_path / "best.ckpt"): 0.5}
    assert {state[key] for key in state if key.endswith("_path")} == {str(tmp_path / "best.ckpt"), ""}
