"""README and guides: their commands and examples run, at a small size, and their links work."""

import json
import os
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

import fewshot
import programs
from fewshot.config import ROOT, compose, compose_unresolved
from fewshot.sweeps import Sweep, as_csv, read_jobs
from fewshot.teaching import teach
from fewshot.training import train

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "notebooks" / "guides").glob("*.md"))
PAGES = [
    *(page for pattern in ("*.md", ".github/**/*.md", "notebooks/**/*.md") for page in sorted(ROOT.glob(pattern))),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = "\n".join(page.read_text() for page in (README, *GUIDES))
PROSE = FENCED.sub("", TEXT)
TYPED = re.findall(
    r"^ {4,}(?:\$ )?((?:python|fewshot|make|pip|torchrun|srun)\b(?:.*\\\n)*.*)", PROSE, re.MULTILINE
) + re.findall(r"`((?:python|fewshot|make) [^`]+)`", PROSE)
COMMANDS = sorted({" ".join(shlex.split(line.replace("\\\n", ""), comments=True)) for line in TYPED})
FILES: dict[str, str] = {}  # examples that name their file, by its path
SCRIPTS: dict[str, str] = {}  # other Python examples, by the page
for page in (README, *GUIDES):
    for language, code in FENCED.findall(page.read_text()):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", code)
        if named:
            FILES[named[1]] = code
        elif language == "python":
            SCRIPTS[page.stem] = code
OWN = "--config-dir conf"  # commands that use these files

TINY = [
    *("train.episodes=2", "train.meta_batch=2", "train.query=1", "val.every=2", "val.episodes=2", "test.episodes=2"),
    *("query=2", "pictures=false"),
]
SMALLER = {
    "seed=0,1": "seed=0",
    "seed=0,1,2": "seed=0",
    "shot=1,5": "shot=1",  # tests/test_sweeps.py has all of them
    "way=5,20": "way=5",
    "dataset.source.split=vinyals,lake,random": "dataset.source.split=vinyals",  # a bank for each takes long
    "hydra.sweeper.n_trials=30": "hydra.sweeper.n_trials=2",
    "episodes=2000": "episodes=2",
    "episodes=10000": "episodes=2",
}
# Commands of which only the configuration is composed.
ELSEWHERE = {
    r"torchrun|srun|hardware=ddp( |$)": "needs several machines or GPUs; tests/test_distributed.py has two processes",
    r"launcher=(submitit|ray|joblib)": "needs a cluster, or processes that import everything; see tests/test_sweeps.py",
    r"figure=(maml_graph|time_profile|scale)": "takes minutes; see tests/figures",
    r"device=cuda": "needs a GPU; see tests/benchmarks",
    r"bench only=": "takes minutes; see tests/benchmarks",
    r"miniimagenet/pretrained|(checkpoint|init)=miniimagenet": "embeds miniImageNet; see tests/test_experiments.py",
    r"reproduce (omniglot|all)|train=true|cards=true": "takes minutes, or writes here; see tests/test_models.py",
    r"dataset=torchvision": "is downloaded; see tests/data/test_torchvision.py",
    r"fewshot demo": "serves until stopped; see tests/test_demo.py",
    r"study=classifiers": "takes an hour; see tests/test_sweeps.py",
    r"dataset=(cifar_fs|fc100)": "is downloaded; see tests/data/test_torchvision.py",
    r"dataset=tieredimagenet": "needs its 608 classes; see tests/data/test_tieredimagenet.py",
}
SUBPROCESS = r"hardware=ddp_cpu"  # child processes run the main program's file
SLOW = (
    r"matching_distance|experiment/omniglot|method=protonet,matching,maml|hardware=ddp_cpu|miniimagenet|source\.split"
    r"|dataset=omniglot,glyphs"
)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, cache_dir):
    """Stand-ins for the directories that the pages name."""
    home = tmp_path_factory.mktemp("readme")
    for name, choice in (("run", "seed=0"), ("other", "seed=1"), ("maml", "method=maml")):
        train(compose(choice, *TINY, f"run_dir={home / name}", f"cache_dir={cache_dir}"))
    random = np.random.default_rng(0)
    for split, classes in (("train", 20), ("val", 5), ("test", 5)):
        for label in range(classes):
            for number in range(4):
                file = home / "images" / split / f"{split}{label}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    shutil.copytree(home / "images" / "val", home / "examples")
    shutil.copytree(home / "images" / "test", home / "pictures")
    images = random.integers(0, 256, (300, 28, 28, 1), dtype=np.uint8)
    np.savez(home / "images.npz", images=images, labels=np.arange(300) % 15)
    for path, code in FILES.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(code)
    torch.manual_seed(0)
    torch.save(get_model("mobilenet_v3_small", weights=None).state_dict(), home / "weights.pth")
    return home


def program(tokens: list[str]) -> tuple[str, list[str]]:
    """Return the name of the fewshot command in a command line, and its arguments."""
    if "fewshot" in tokens:
        name, *arguments = tokens[tokens.index("fewshot") + 1 :]
        return name, arguments
    position = next(position for position, token in enumerate(tokens) if token.startswith("src/"))
    return Path(tokens[position]).stem, tokens[position + 1 :]


def small(name: str, arguments: list[str], stand_ins: Path, tmp_path: Path) -> list[str]:
    """Change the arguments to existing directories and small settings."""
    names = {
        r"OTHER_RUN_DIR": str(stand_ins / "other"),
        r"(?<!OTHER_)RUN_DIR|outputs/DATE/TIME_\w+": str(stand_ins / "run"),
        r"run\.dir=PATH": f"run.dir={tmp_path / 'run'}",
        r"data_dir=PATH": f"data_dir={stand_ins / 'images'}",
        r"^(more/runs|outputs/tables)$": str(stand_ins / "run"),
        r"^runs=outputs/distances": f"runs={ROOT / 'notebooks/results/distance_study'}",
        r"^runs=FOLDER": f"runs={stand_ins / 'maml'}",
        r"=(examples|pictures|images\.npz)$": rf"={stand_ins}/\1",
        r"out=\w+\.onnx": f"out={tmp_path / 'encoder.onnx'}",
        r"out=weights": f"out={tmp_path / 'weights'}",
        r"(?<=[=,])notebooks/": f"{ROOT}/notebooks/",
        r"=lite0\.pth$": f"={stand_ins / 'lite0.pth'}",
        r"model=mine\.fewshot": f"model={stand_ins / 'mine.fewshot'}",
        r"out=(mine|more)\.(\w+)": rf"out={stand_ins}/\1.\2",
    }
    smaller = []
    for argument in arguments:
        for pattern, value in names.items():
            argument = re.sub(pattern, value, argument)  # noqa: PLW2901
        smaller.append(SMALLER.get(argument, argument))
    if "..." in smaller:
        smaller[smaller.index("...")] = "seed=0,1" if "-m" in smaller else "seed=0"
    if "figure=adaptation" in smaller:
        smaller.append("figure.episodes=2")
    if "encoder=pretrained" in smaller:
        smaller += ["encoder.name=mobilenet_v3_small", f"encoder.file={stand_ins / 'weights.pth'}"]
        smaller.append("dataset.size=28")  # the encoder enlarges them; drawing 20,000 large glyphs takes minutes
    keys = {argument.partition("=")[0] for argument in smaller}
    if "--help" in smaller:
        return smaller
    if name == "train":
        smaller += TINY if "resume" not in keys or "resume=auto" in smaller else []
        if "-m" in smaller and "hydra.sweep.dir" not in keys:
            smaller.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
        elif "-m" not in smaller and not keys & {"hydra.run.dir", "resume"}:
            smaller.append(f"hydra.run.dir={tmp_path / 'run'}")
    elif "-m" in smaller:
        smaller.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    elif name not in ("demo", "models") and "out" not in keys:
        smaller.append(f"out={tmp_path / 'out'}")
    return smaller


def test_commands_and_examples_are_found():
    assert len(COMMANDS) > 45 and len(FILES) == 4 and set(SCRIPTS) == {"README", "extending", "sweeps"}
    assert "fewshot train -m method=protonet,matching,maml shot=1,5 way=5,20" in COMMANDS


@pytest.mark.parametrize(
    "command",
    [pytest.param(line, marks=pytest.mark.slow if re.search(SLOW, line) else ()) for line in COMMANDS],
)
def test_command_runs(command, request, stand_ins, cache_dir, tmp_path, monkeypatch):
    for part in command.split(" && "):
        tokens = part.split(" ")
        if tokens[0] == "make":
            subprocess.run(["make", "--dry-run", *tokens[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        if tokens[:2] == ["pip", "install"]:
            continue
        name, arguments = program(tokens)
        arguments = small(name, arguments, stand_ins, tmp_path)
        if re.search("(dataset=|experiment[=/]|reproduction/|reproduce .*)(omniglot|miniimagenet|matching)", part):
            arguments.append(f"data_dir={request.getfixturevalue('real_data')}")
        if any(re.search(pattern, part) for pattern in ELSEWHERE):
            given = [item for item in arguments if "=" in item and not re.match(r"-|\+?hydra|seed=0,1", item)]
            compose_unresolved(*given, name=name)
            continue
        if "sweeper=search" in part:
            pytest.importorskip("optuna", minversion="5", reason="no Optuna: pip install -e '.[optuna]'")
        if "encoder=timm" in part or "encoder=lite0" in part:
            timm = pytest.importorskip("timm", reason="no timm: pip install -e '.[timm]'")
            network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
            torch.save(network.state_dict(), stand_ins / "lite0.pth")
        if "model=mine" in part:
            given = ["encoder=pretrained", f"support={stand_ins / 'examples'}", f"out={stand_ins / 'mine.fewshot'}"]
            teach(compose(*small("teach", given, stand_ins, tmp_path), name="teach"))
        if name == "export" and ".onnx" in part and find_spec("onnx") is None:
            pytest.skip("onnx is not installed: pip install -e '.[export]'")
        script = ROOT / "src" / f"{name}.py"
        monkeypatch.setenv("FEWSHOT_CACHE_DIR", str(cache_dir))
        monkeypatch.setenv("COLUMNS", "150")
        if OWN in part or re.search(SUBPROCESS, part):
            path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
            cwd = stand_ins if OWN in part else tmp_path
            done = programs.call(script, arguments, cwd, os.environ | {"PYTHONPATH": path}, timeout=500)
            assert done.returncode == 0, done.stderr
            continue
        # Run in this process to save the time of starting another; undo what the program changes.
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(Sweep, "folder", None)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", HydraConfig.instance().cfg)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.chdir(tmp_path)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert end.code in (None, 0)  # noqa: PT017


@pytest.mark.filterwarnings("ignore")  # of Lightning, about the small settings
@pytest.mark.parametrize("page", SCRIPTS)
def test_python_example_runs(page, stand_ins, cache_dir, tmp_path, monkeypatch):
    def train_little(**settings):
        overrides = [override for override in TINY if not override.startswith("train.query")]
        return really_train(*overrides, f"run_dir={tmp_path / 'run'}", **settings)

    really_train = fewshot.train
    monkeypatch.setitem(vars(fewshot), "train", train_little)
    monkeypatch.setenv("FEWSHOT_CACHE_DIR", str(cache_dir))
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "pictures"):
        (tmp_path / name).symlink_to(stand_ins / name)
    sweep = tmp_path / "outputs" / "sweep"
    (sweep / "0").mkdir(parents=True)
    shutil.copy(stand_ins / "run" / "results.json", sweep / "0")
    (sweep / "results.csv").write_text(as_csv(read_jobs(sweep)))
    code = SCRIPTS[page].replace('train={"episodes": 1000}', 'train={"episodes": 2}, val={"episodes": 2}')
    exec(compile(code, page, "exec"), {"__name__": "example"})


def prose(page: Path) -> str:
    """Return the text of a page or a notebook without fenced code."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCED.sub("", text)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub generates them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_work(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        assert linked.is_relative_to(ROOT)
        assert not anchor or anchor in headings(linked), f"{target}: no such heading"


def test_readme_is_short_and_links_to_every_guide():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert all(f"(notebooks/guides/{guide.name})" in text for guide in GUIDES)
    assert "    make train " in text and "    make test " in text


# What strangers ask, the link in the README that leads to the answer, and what is there.
QUESTIONS = {
    "How do I train on my own photos?": ("data.md#your-own-images", "dataset=folder data_dir=PATH"),
    "How do I classify photos without training?": ("predict.md", "encoder=pretrained support"),
    "Where do I put miniImageNet?": ("data.md", "Put the files into `data_dir`"),
    "How do I resume?": ("resuming.md", "fewshot train resume="),
    "How do I sweep over shots?": ("sweeps.md", "shot=1,5"),
    "How do I read the results in pandas?": ("sweeps.md#read-the-results-in-pandas", "results.csv"),
    "How do I use several GPUs?": ("distributed.md", "hardware=ddp"),
    "How do I add an encoder?": ("extending.md#an-encoder", "encoder"),
    "How do I add a data set?": ("extending.md#a-data-set", "dataset"),
    "How do I test a trained network at 20-way 5-shot?": ("predict.md#evaluate", "fewshot evaluate checkpoint="),
    "How do I reproduce a number of the paper?": ("reproduce.md", "experiment="),
    "Can you share a checkpoint?": ("reproduce.md#without-training", "fewshot models"),
    "What does a run leave?": ("train.md#what-a-run-leaves", "results.json"),
    "How do I look at the curves?": ("train.md#dashboards-and-loggers", "make dashboard"),
    "The loss is NaN, or the disk was full; what now?": ("robustness.md", "NaN"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stranger_finds_the_answer_one_click_from_the_readme(question):
    target, answer = QUESTIONS[question]
    assert f"(notebooks/guides/{target})" in README.read_text()
    page, _, anchor = target.partition("#")
    sections = re.split(r"^(?=#+ )", (ROOT / "notebooks" / "guides" / page).read_text(), flags=re.MULTILINE)
    title = anchor.replace("-", "[ -]")
    assert any(answer in section for section in sections if re.match(rf"#+ {title}", section, re.IGNORECASE))


def test_extras_exist():
    extras = [extra for extras in re.findall(r"\.\[([\w,]+)\]", TEXT) for extra in extras.split(",")]
    text = (ROOT / "pyproject.toml").read_text()
    assert extras and all(f"\n{extra} = [" in text for extra in extras)


def rows(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows, by column name, of the table whose first column has the name ``first``."""
    table = re.search(rf"^\| {first} \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_results_in_the_readme_match_the_generated_tables():
    generated = rows((ROOT / "notebooks" / "guides" / "reproduce.md").read_text(), "method")
    for line in generated:
        line["task"] = re.sub(r" \(\d+\)$", "", line["task"])  # the number of a line among those of its cell
    for row in rows(README.read_text(), "method"):
        assert any(row.items() <= line.items() for line in generated), row
