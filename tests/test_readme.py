"""What the README tells to type is typed here: its commands, made small, and its examples, as they stand."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from torchvision.models import get_model

from fewshot.config import ROOT, compose, compose_unresolved
from fewshot.sweeps import Sweep
from fewshot.training import train

README = (ROOT / "README.md").read_text()
TYPED = re.findall(r"^    (?:\$ )?((?:python|make|pip|torchrun|srun)\b(?:.*\\\n)*.*)", README, re.MULTILINE)
INLINE = re.findall(r"`((?:python|make) [^`]+)`", README)
COMMANDS = sorted({" ".join(shlex.split(of.replace("\\\n", ""), comments=True)) for of in [*TYPED, *INLINE]})
EXAMPLES = {
    path: text
    for text in re.findall(r"^```\w+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for path in re.findall(r"\A# ((?:src|conf)/\S+)$", text, re.MULTILINE)
}
OF_EXAMPLES = "|".join(f"{Path(of).parent.name}={Path(of).stem}" for of in EXAMPLES if of.startswith("conf"))

TINY = [
    *("train.episodes=2", "train.meta_batch=2", "train.query=1", "val.every=2", "val.episodes=2", "test.episodes=2"),
    *("query=2", "pictures=false"),
]
SMALLER = {
    "seed=0,1": "seed=0",
    "seed=0,1,2": "seed=0",
    "hydra.sweeper.n_trials=30": "hydra.sweeper.n_trials=2",
    "episodes=2000": "episodes=2",
}
# Of these only the configuration is composed here.
ELSEWHERE = {
    r"torchrun|srun|hardware=ddp( |$)": "several machines or GPUs: tests/test_distributed.py has two processes",
    r"launcher=(submitit|ray)": "a cluster",
    r"src/bench\.py": "minutes on an idle machine: tests/benchmarks",
    r"figure=(maml_graph|time_profile)": "minutes: tests/figures",
    r"src/demo\.py": "it serves until it is stopped: tests/test_demo.py",
}
SUBPROCESS = r"launcher=joblib|hardware=ddp_cpu"  # other processes look for the program of the first


@pytest.fixture(scope="module")
def places(tmp_path_factory, cache_dir):
    """What stands for the README's names of folders."""
    home = tmp_path_factory.mktemp("readme")
    for name, choice in (("run", "seed=0"), ("other", "seed=1"), ("maml", "method=maml")):
        train(compose(choice, *TINY, f"run_dir={home / name}", f"cache_dir={cache_dir}"))
    random = np.random.default_rng(0)
    for split, classes in (("train", 20), ("val", 5), ("test", 5)):
        for of in range(classes):
            for number in range(4):
                file = home / "images" / split / f"{split}{of}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    shutil.copytree(home / "images" / "val", home / "examples")
    shutil.copytree(home / "images" / "test", home / "pictures")
    images = random.integers(0, 256, (300, 28, 28, 1), dtype=np.uint8)
    np.savez(home / "images.npz", images=images, labels=np.arange(300) % 15)
    torch.manual_seed(0)
    torch.save(get_model("mobilenet_v3_small", weights=None).state_dict(), home / "weights.pth")
    return home


def small(tokens: list[str], places: Path, tmp_path: Path) -> list[str]:
    """The arguments of one of the programs in src, the README's names replaced and the work made little."""
    script, *arguments = tokens
    study = f"runs={ROOT / 'notebooks/results/distance_study'}"
    names = {
        r"OTHER_RUN_DIR": str(places / "other"),
        r"(?<!OTHER_)RUN_DIR|outputs/DATE/TIME_\w+": str(places / "run"),
        r"run\.dir=PATH": f"run.dir={tmp_path / 'run'}",
        r"data_dir=PATH": f"data_dir={places / 'images'}",
        r"^(more/runs|outputs/reproduce)$": str(places / "run"),
        r"^runs=outputs/distances": study,
        r"^runs=FOLDER": f"runs={places / 'maml'}",
        r"=(u/support|examples)$": f"={places / 'examples'}",
        r"=(u/query|pictures)$": f"={places / 'pictures'}",
        r"=outputs/omni$": f"={places / 'run'}",
        r"out=\w+\.onnx": f"out={tmp_path / 'encoder.onnx'}",
        r"data_dir=images\.npz": f"data_dir={places / 'images.npz'}",
    }
    found = []
    for argument in arguments:
        for name, value in names.items():
            argument = re.sub(name, value.replace("\\", r"\\"), argument)  # noqa: PLW2901
        found.append(SMALLER.get(argument, argument))
    if "..." in found:
        found[found.index("...")] = "seed=0,1" if "-m" in found else "seed=0"
    if "figure=adaptation" in found:
        found.append("figure.episodes=2")
    if "encoder=pretrained" in found:
        found += ["encoder.name=mobilenet_v3_small", f"encoder.file={places / 'weights.pth'}"]
    if script == "src/train.py" and "--help" not in found:
        given = {of.partition("=")[0] for of in found}
        found += TINY if "resume" not in given or "resume=auto" in found else []
        if "-m" in found and "hydra.sweep.dir" not in given:
            found.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
        elif "-m" not in found and "hydra.run.dir" not in given and "resume" not in given:
            found.append(f"hydra.run.dir={tmp_path / 'run'}")
    elif (
        script not in {"src/train.py", "src/demo.py"}
        and "--help" not in found
        and not any("out=" in of for of in found)
    ):
        found.append(f"out={tmp_path / 'out'}")
    return found


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the project with the README's examples in it."""
    house = tmp_path_factory.mktemp("house")
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, house / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path, text in EXAMPLES.items():
        assert not (house / path).exists()
        (house / path).write_text(text)
    return house


def test_the_readme_is_read_as_it_is_written():
    assert len(COMMANDS) > 30 and len(EXAMPLES) == 4
    assert "python src/train.py -m method=protonet,matching,maml shot=1,5 way=5,20" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, request, places, cache_dir, tmp_path, monkeypatch):
    for part in command.split(" && "):
        tokens = part.split(" ")
        if tokens[0] == "make":
            subprocess.run(["make", "--dry-run", *tokens[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        if tokens[:2] == ["pip", "install"]:
            extra = re.search(r"\[(\w+)\]", tokens[-1])
            assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
            continue
        program = next(position for position, token in enumerate(tokens) if token.startswith("src/"))
        arguments = small(tokens[program:], places, tmp_path)
        if re.search("dataset=(omniglot|miniimagenet)|experiment=(omniglot|miniimagenet)|matching_distance", part):
            arguments.append(f"data_dir={request.getfixturevalue('real_data')}")
        script = ROOT / tokens[program]
        if any(re.search(of, part) for of in ELSEWHERE):
            chosen = [of for of in arguments if not re.match("-|hydra|seed=0,1", of)]
            compose_unresolved(*chosen, name=script.stem)
            continue
        if script.stem == "export" and find_spec("onnx") is None:
            pytest.skip("onnx is not installed: pip install -e '.[export]'")
        monkeypatch.setenv("FEWSHOT_CACHE_DIR", str(cache_dir))
        monkeypatch.setenv("COLUMNS", "150")
        if re.search(OF_EXAMPLES, part):
            script = request.getfixturevalue("house") / tokens[program]
        if re.search(OF_EXAMPLES, part) or re.search(SUBPROCESS, part):
            done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            continue
        # In this process, for the time that it takes to start one; what the programs set is put back.
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(Sweep, "folder", None)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", HydraConfig.instance().cfg)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.chdir(tmp_path)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert end.code in (None, 0)  # noqa: PT017
