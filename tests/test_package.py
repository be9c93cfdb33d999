"""The package as users install it: built, installed into its own environment, used outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from graphlib import CycleError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewshot
from fewshot.commands import COMMANDS
from fewshot.config import CONF, ROOT
from fewshot.models import short_names
from modules import imports, levels

HEAVY = {"torch", "torchvision", "pytorch_lightning", "lightning_fabric", "matplotlib", "numpy"}
MODEL = ("card.json", "episodes.csv", "weights.safetensors")
TINY = ["train.episodes=4", "train.way=3", "val.every=2", "val.episodes=3", "test.episodes=5", "hardware=cpu"]


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        ([], 0, "  train     Train a few-shot method"),
        (["--version"], 0, f"fewshot {fewshot.__version__}"),
        (["train", "--help"], 0, "way: 5  # classes per validation"),
        (["report", "--help"], 0, "# python src/report.py RUNS..."),
        (["tarin"], 1, "error: tarin is not a command (did you mean train?); choose one of train, evaluate, "),
        (["train", "wya=5"], 1, "error: Could not override 'wya'. (did you mean way?) (see train.py --help)"),
        (["models"], 0, " glyphs/protonet "),
        (["evaluate", "hardware=cup"], 1, "(did you mean cpu?) (see evaluate.py --help)"),
        (["train", "-sc", "query=bash"], 0, "distance=cosine distance=l2 distance=scaled_cosine"),
        (["-sc", "query=bash"], 0, "distance=cosine distance=l2 distance=scaled_cosine"),
    ],
)
def test_help_completion_and_errors_need_no_slow_imports(arguments, status, shown):
    look = "import atexit, sys; atexit.register(lambda: print('imported', *sys.modules)); from fewshot.cli import main"
    line = "fewshot train distance=" if arguments[0:1] == ["-sc"] else "fewshot distance="
    done = python("-c", f"{look}; sys.argv[0] = 'fewshot'; main()", *arguments, env=os.environ | {"COMP_LINE": line})
    output, _, imported = done.stdout.rpartition("imported")
    assert done.returncode == status
    assert shown in output + done.stderr and "Traceback" not in done.stderr
    assert not HEAVY & set(imported.split())


def test_the_names_of_commands_are_completed():
    done = python("-m", "fewshot", "-sc", "query=bash", env=os.environ | {"COMP_LINE": "fewshot "})
    assert done.stdout.split() == list(COMMANDS)


def test_every_command_has_a_program_in_src_and_a_file_in_conf():
    assert {path.stem for path in (ROOT / "src").glob("*.py")} == set(COMMANDS)
    assert {path.stem for path in CONF.glob("*.yaml")} == set(COMMANDS)


def test_no_module_imports_another_in_a_circle(tmp_path):
    assert levels(imports())[-1] == ["fewshot.__main__"]
    (tmp_path / "src" / "fewshot").mkdir(parents=True)
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "src" / "fewshot" / f"{name}.py").write_text(f"def f():\n    from fewshot import {other}\n")
    with pytest.raises(CycleError):
        levels(imports(tmp_path))


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an "sdist" or a "wheel" with the installed setuptools."""
    out.mkdir(exist_ok=True)
    done = python("-c", f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))", cwd=source)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist, as users of PyPI would without a wheel."""
    pytest.importorskip("setuptools", minversion="77")
    directory = tmp_path_factory.mktemp("package")
    copy = directory / "copy"
    copy.mkdir()
    for name in ("src", "conf", "notebooks/results/reproduction"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    with tarfile.open(build("sdist", copy, directory)) as archive:
        archive.extractall(directory, filter="data")
    return build("wheel", directory / f"fewshot-{fewshot.__version__}", directory)


@pytest.mark.slow
def test_the_wheel_contains_the_whole_package_and_its_configuration(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    packages = [ROOT / "src" / "fewshot", ROOT / "src" / "hydra_plugins"]
    kinds = ("*.py", "*.txt")
    package = {path.relative_to(ROOT / "src") for folder in packages for kind in kinds for path in folder.rglob(kind)}
    configuration = {Path("fewshot/conf") / path.relative_to(CONF) for path in CONF.rglob("*.yaml")}
    page = {Path("fewshot/page", path.name) for path in (ROOT / "src" / "fewshot" / "page").iterdir()}
    models = {Path("fewshot/shipped", line, name) for line in short_names().values() for name in MODEL}
    expected = {path.as_posix() for path in [*package, *configuration, *models, *page, Path("fewshot/py.typed")]}
    assert wheel.stat().st_size < 3e6
    assert {name for name in held if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("folder", ["src", "src/benchmarks", "src/figures"])
def test_no_script_hides_a_module_of_the_standard_library(folder):
    """A script's folder comes first in the search path: a ``profile.py`` there broke PyTorch's import of cProfile."""
    here = {path.stem for path in (ROOT / folder).iterdir()}
    assert not here & sys.stdlib_module_names


@pytest.mark.slow
def test_the_wheel_alone_trains_evaluates_predicts_and_resumes(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    interpreter = tmp_path / "venv" / "bin" / "python"
    # Without PYTHONPATH, which may lead to this checkout.
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FEWSHOT"))}
    done = python("-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel, env=variables)
    assert done.returncode == 0, done.stderr
    # The dependencies installed here; a path in a .pth file adds no editable install of this project.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    home = tmp_path / "home"
    home.mkdir()
    variables |= {"FEWSHOT_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "150"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [interpreter.with_name("fewshot"), *arguments]
        return subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True)

    def run(*arguments: str) -> str:
        done = call(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"fewshot {fewshot.__version__}\n"
    assert "# fewshot train GROUP=OPTION" in run("train", "--help")
    run("train", *TINY)
    (results,) = (home / "outputs").rglob("results.json")
    assert json.loads(results.read_text())["commit"] is None
    assert json.loads(results.read_text())["config"]["data_dir"] == str(home / "data")
    results.unlink()
    run("train", f"resume={results.parent}")
    accuracy = json.loads(results.read_text())["accuracy"]
    run("evaluate", f"checkpoint={results.parent}", "out=evaluated", "hardware=cpu")
    assert json.loads((home / "evaluated" / "results.json").read_text())["accuracy"] == accuracy
    random = np.random.default_rng(0)
    for folder in ("support/a", "support/b", "query"):
        (home / folder).mkdir(parents=True)
        for number in range(2):
            pixels = random.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(home / folder / f"{number}.png")
    run("predict", f"checkpoint={results.parent}", "support=support", "query=query", "out=predicted")
    assert len((home / "predicted" / "predictions.csv").read_text().splitlines()) == 3
    assert "report.md" in run("report", "outputs", "out=reported")
    assert all(name in run("models") for name in short_names())
    assert "  equal\n" in run("reproduce", "glyphs/protonet", "hardware=cpu")
    run("predict", "checkpoint=omniglot/protonet", "support=support", "query=query", "out=predicted")
    for command in ("bench", "figure"):
        done = call(command)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: fewshot {command} works only in a checkout of the project")
        assert len(done.stderr.splitlines()) == 1
    done = call("train", "wya=3")
    assert done.stderr == "error: Could not override 'wya'. (did you mean way?) (see fewshot train --help)\n"
    assert {path.name for path in home.iterdir()} <= {
        *("outputs", "evaluated", "support", "query", "predicted", "reported", "data")
    }


def test_the_package_has_complete_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fewshot": "fewshot.cli:main"}
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in project["classifiers"]
