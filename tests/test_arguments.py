"""Command lines and paths as people type them."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import programs
from command_lines import COMPOSED, PARSED
from fewshot import cli as command_line
from fewshot.arguments import prepare, quoted
from fewshot.commands import COMMANDS
from fewshot.config import ROOT, compose, compose_unresolved, current_names
from fewshot.directories import checkpoint_at
from fewshot.errors import FewShotError
from fewshot.paths import make_absolute, run_directory
from path_lines import run_all


@pytest.mark.parametrize("arguments", PARSED, ids=" ".join)
def test_a_command_line_is_accepted_or_the_error_says_what_to_type(arguments):
    message = PARSED[arguments]
    if message is None:
        assert sorted(prepare(arguments)) == sorted(arguments)
        return
    with pytest.raises(FewShotError, match=message):
        prepare(arguments)


@pytest.mark.parametrize("arguments", COMPOSED, ids=" ".join)
def test_what_cannot_be_composed_is_explained(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *current_names(prepare(arguments))])
    found = "; ".join(command_line._wrong_overrides())
    assert re.search(COMPOSED[arguments] or "^$", found), found


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("train", "hydra.run.dir=PATH (results), cache_dir=PATH and data_dir=PATH"),
        ("mine", "hydra.run.dir=PATH (results), cache_dir=PATH and data_dir=PATH"),
        ("predict", "out=PATH and cache_dir=PATH"),
        ("report", "out=PATH"),
        ("models", None),
    ],
)
def test_a_path_that_cannot_be_used_is_explained_with_the_keys_of_the_command(monkeypatch, name, keys):
    monkeypatch.setattr(command_line, "_command", name)
    line = command_line._explain(FileNotFoundError(2, "No such file or directory", "x"))
    instead = "" if keys is None else f", or choose other paths with {keys}"
    assert line == f"x: No such file or directory; fix that{instead}"


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("report", "runs=null", "runs=None must be a string or a list of at least one string"),
        ("compare", "runs=[]", r"runs=\[\] must be a string or a list of at least one string"),
        ("models", "names=null", "names=None must be a list of strings"),
        ("models", "cards=no", "cards=no must be true or false"),
        ("report", "out=null", "out=None must be a path"),
        ("compare", "reference=5", "reference=5 must be a path or null"),
        ("figure", "out=null", "out=None must be a path"),
        ("export", "model=5", "model=5 must be a path or null"),
        ("teach", "out=null", "out=None must be a path"),
        ("reproduce", "cache_dir=null", "cache_dir=None must be a path"),
        ("bench", "rounds=0", "rounds=0 must be a whole number of at least 1"),
        ("bench", "seconds=0", "seconds=0 must be a number above 0"),
        ("bench", "only=maml", "only=maml must be a list of at least one string or null"),
    ],
)
def test_a_value_of_another_type_is_refused(name, typed, message):
    with pytest.raises(FewShotError, match=f"^{message}$"):
        COMMANDS[name](compose(typed, name=name))


def test_the_new_name_of_a_key_is_given(monkeypatch):
    monkeypatch.setattr(command_line, "_command", "reproduce")
    monkeypatch.setattr(sys, "argv", ["fewshot", "lines=[glyphs/protonet]"])
    assert list(command_line._wrong_overrides()) == ["lines is now rows, of fewshot reproduce"]


def test_suggestions_know_the_primary_configuration_of_the_user(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\ncallbacks: {colour: red}\n")
    typed = ["train.py", "--config-dir", str(tmp_path), "--config-name", "mine", "callbacks.color=blue", "wya=5"]
    monkeypatch.setattr(sys, "argv", typed)
    colour, way = command_line._wrong_overrides()
    assert "did you mean callbacks.colour?" in colour and "did you mean way?" in way


def test_options_go_before_overrides_and_keep_their_order():
    typed = ["way=5", "-m", "shot=1,2", "--config-dir", "mine", "seed=1"]
    assert prepare(typed) == ["-m", "--config-dir", "mine", "way=5", "shot=1,2", "seed=1"]


@pytest.mark.parametrize("value", ["a b", "[x]", "(y)", "a=b", "#1", "1,2", "鸟", "it's", 'a"b', "{a}", "a&b;c|d", "*"])
def test_the_suggested_quotes_give_the_value(value):
    (typed,) = shlex.split(quoted(f"data_dir={value}"))
    prepare([typed])
    assert OverridesParser.create().parse_override(typed).value() == value
    assert compose(typed).data_dir == value


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("hydra.run.dir=~/x", "hydra.run.dir={home}/x"), ("hydra.sweep.dir=~", "hydra.sweep.dir={home}")),
        *(("data_dir=~/x", "data_dir={home}/x"), ("resume=~/x/y", "resume={home}/x/y")),
        *(("runs=[~/a,~/b]", "runs=[{home}/a,{home}/b]"), ('data_dir="~/x"', 'data_dir="~/x"')),
        ("~logger", "~logger"),
    ],
)
def test_the_home_directory_is_known_everywhere(typed, meant):
    assert prepare([typed]) == [meant.format(home=Path.home())]


def test_paths_start_where_the_command_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(
        {
            **{"data_dir": "data", "cache_dir": "~/cache", "resume": "auto", "checkpoint": "newest", "out": None},
            **{"support": "/a/b", "query": "photos/*.jpg", "runs": ["x", "~/y"], "encoder": {"init": "run"}},
            **{"dataset": {"source": {"data_dir": "${data_dir}"}}, "reference": "../run"},
        }
    )
    make_absolute(config, is_model=lambda _: False)
    assert OmegaConf.to_container(config, resolve=True) == {
        **{"data_dir": f"{tmp_path}/data", "cache_dir": f"{Path.home()}/cache", "resume": "auto"},
        **{"checkpoint": "newest", "out": None, "support": "/a/b", "query": f"{tmp_path}/photos/*.jpg"},
        **{"runs": [f"{tmp_path}/x", f"{Path.home()}/y"], "encoder": {"init": f"{tmp_path}/run"}},
        **{"dataset": {"source": {"data_dir": f"{tmp_path}/data"}}, "reference": f"{tmp_path}/../run"},
    }


@pytest.mark.slow
def test_every_command_takes_paths_as_they_are_typed(tmp_path):
    def call(program, arguments, cwd, env):
        done = programs.call(ROOT / "src" / f"{program}.py", arguments, cwd, env, timeout=300)
        return done.stderr if done.returncode else None

    wrong = {str(line): outcome for line, outcome in run_all(call, tmp_path) if outcome != "done"}
    assert not wrong


@pytest.mark.parametrize("name", ["FEWSHOT_DATA_DIR", "FEWSHOT_CACHE_DIR"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_empty_environment_variable_counts_as_unset(monkeypatch, name, command):
    key = name.removeprefix("FEWSHOT_").lower()
    monkeypatch.delenv(name, raising=False)
    unset = compose_unresolved(name=command)[key]
    monkeypatch.setenv(name, "")
    assert compose_unresolved(name=command)[key] == unset
    monkeypatch.setenv(name, "/mine")
    assert compose_unresolved(name=command)[key] == "/mine"


def test_an_empty_rank_counts_as_unset(monkeypatch):
    from fewshot import processes  # noqa: PLC0415

    monkeypatch.delitem(sys.modules, "lightning_fabric.utilities.rank_zero", raising=False)
    for name in processes.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert processes.rank() == 3


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/best.ckpt", "run/checkpoints/"])
def test_a_run_is_named_by_its_directory_its_checkpoints_or_a_file(tmp_path, named):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    best.touch()
    assert checkpoint_at(tmp_path / named) == best
    assert run_directory(f"{tmp_path}/{named}") == str(tmp_path / "run")
    assert run_directory(f"{tmp_path}/run/weights.safetensors") == str(tmp_path / "run")


def test_a_run_without_a_best_checkpoint_is_named_by_where_it_should_be(tmp_path):
    assert checkpoint_at(tmp_path) == tmp_path / "checkpoints" / "best.ckpt"
