"""Commands with paths as people type them, from several directories.

The tests try them, and

    PYTHONPATH=src python tests/path_lines.py

trains a tiny network, runs each command, and prints the first line of its error, or "done" if it wrote the right file.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import programs

TINY = [
    *("dataset=folder", "dataset.size=28", "train.episodes=2", "train.way=2", "train.query=1", "way=2", "query=1"),
    *("val.every=2", "val.episodes=2", "test.episodes=2", "encoder.filters=8", "hardware=cpu", "pictures=false"),
]
SMALL = ["hardware=cpu", "episodes=2"]
ODD = "my (photos) [1], 鸟=#"


@dataclass(frozen=True)
class Line:
    """A command line.

    Attributes:
        program: its name.
        typed: its arguments with paths.
        leaves: a file that it should write, below the directory that contains ``home``, ``here`` and ``there``.
        more: other arguments.
        cwd: where it is typed.
        env: environment variables.
    """

    program: str
    typed: str
    leaves: str
    more: tuple[str, ...] = ()
    cwd: str = "here"
    env: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        place = "" if self.cwd == "here" else f" (typed in {self.cwd}/)"
        variables = "".join(f"{key}={value} " for key, value in self.env)
        return f"{variables}{self.program} {self.typed}{place}"


def train(typed: str, leaves: str, **options: object) -> Line:
    return Line("train", typed, leaves, tuple(TINY), **options)  # type: ignore[arg-type]


def evaluate(typed: str, leaves: str, **options: object) -> Line:
    return Line("evaluate", typed, leaves, tuple(SMALL), **options)  # type: ignore[arg-type]


LINES = [
    train("data_dir=~/photos hydra.run.dir=a1", "here/a1/results.json"),
    train("data_dir=photos hydra.run.dir=a2", "here/a2/results.json"),
    train("data_dir=./photos/ hydra.run.dir=a3/", "here/a3/results.json"),
    train("data_dir=../home/photos hydra.run.dir=../a4", "a4/results.json"),
    train("data_dir=photos hydra.run.dir=a5 hydra.job.chdir=true", "here/a5/results.json"),
    train("data_dir=~/photos hydra.run.dir=~/a6", "home/a6/results.json"),
    train("data_dir=~/photos hydra.run.dir=~/a7 hydra.job.chdir=true", "home/a7/results.json"),
    train(f'data_dir="{ODD}" hydra.run.dir=a8', "here/a8/results.json"),
    train(f'data_dir=photos hydra.run.dir="{ODD}/a9"', f"here/{ODD}/a9/results.json"),
    train("data_dir=photos.zip hydra.run.dir=a10", "here/a10/results.json"),
    train("-m seed=0 data_dir=photos hydra.sweep.dir=~/sweep", "home/sweep/0/results.json"),
    train("-m seed=0 data_dir=photos hydra.sweep.dir=sweep hydra.job.chdir=true", "here/sweep/0/results.json"),
    train("hydra.run.dir=a11", "here/a11/results.json", env=(("FEWSHOT_DATA_DIR", "photos"),)),
    train("hydra.run.dir=a12", "here/a12/results.json", env=(("FEWSHOT_DATA_DIR", "~/photos"),)),
    train("data_dir=photos hydra.run.dir=a13", "here/a13/results.json", env=(("FEWSHOT_DATA_DIR", ""),)),
    train("data_dir=photos hydra.run.dir=a14", "home/.cache/fewshot", env=(("FEWSHOT_CACHE_DIR", ""),)),
    train("data_dir=photos hydra.run.dir=a15 cache_dir=~/mine", "home/mine"),
    train("data_dir=photos hydra.run.dir=a16 encoder.init=run", "here/a16/results.json"),
    train("data_dir=photos hydra.run.dir=a17 encoder.init=~/run/checkpoints/best.ckpt", "here/a17/results.json"),
    Line("train", "resume=half1 data_dir=photos", "here/half1/results.json"),
    Line("train", "resume=./half2/ data_dir=photos", "here/half2/results.json"),
    Line("train", "resume=half3/checkpoints data_dir=photos", "here/half3/results.json"),
    Line("train", "resume=half4/checkpoints/last.ckpt data_dir=photos", "here/half4/results.json"),
    Line("train", "resume=~/half data_dir=~/photos", "home/half/results.json"),
    Line("train", "resume=half5 data_dir=photos hydra.job.chdir=true", "here/half5/results.json"),
    Line("train", "resume=half data_dir=~/photos", "there/half/results.json", cwd="there"),
    evaluate("checkpoint=run data_dir=photos out=b1", "here/b1/results.json"),
    evaluate("checkpoint=run/checkpoints data_dir=photos out=b2", "here/b2/results.json"),
    evaluate("checkpoint=run/checkpoints/best.ckpt data_dir=photos out=b3", "here/b3/results.json"),
    evaluate("checkpoint=~/run data_dir=~/photos out=~/b4", "home/b4/results.json"),
    evaluate("checkpoint=run data_dir=photos out=b5 hydra.job.chdir=true", "here/b5/results.json"),
    evaluate("checkpoint=moved data_dir=../here/photos out=b6", "there/b6/results.json", cwd="there"),
    evaluate("checkpoint=moved data_dir=~/photos out=b7", "there/b7/results.json", cwd="there"),
    evaluate("checkpoint=run against=~/run data_dir=photos out=b8", "here/b8/results.json"),
    Line("predict", "checkpoint=run support=photos query=~/pictures out=c1", "here/c1/predictions.csv"),
    Line("predict", "checkpoint=~/run support=~/photos query=pictures/*.png out=~/c2", "home/c2/predictions.csv"),
    Line("predict", "checkpoint=run/checkpoints support=photos/ query=pictures/0.png out=c3", "here/c3"),
    Line("report", "run ~/run out=d1", "here/d1/report.md"),
    Line("compare", "run ~/run out=d2", "here/d2"),
]


Call = Callable[[str, list[str], Path, dict[str, str]], str | None]


def run_all(call: Call, top: Path) -> Iterator[tuple[Line, str]]:
    """Run each command line; yields it with its outcome.

    Args:
        call: runs a program with arguments in a directory and an environment, and returns its error or None.
        top: an empty directory.
    """
    home, here, there = (top / name for name in ("home", "here", "there"))
    random = np.random.default_rng(0)
    for number in range(12):
        for image in range(4):
            path = home / "photos" / f"class{number}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    (home / "pictures").mkdir()
    for image in range(2):
        pixels = random.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "pictures" / f"{image}.png")
    shutil.copytree(home / "pictures", here / "pictures")
    for name in ("photos", ODD):
        shutil.copytree(home / "photos", here / name)
    shutil.make_archive(str(here / "photos"), "zip", here / "photos")
    env = {key: value for key, value in os.environ.items() if not key.startswith("FEWSHOT_")} | {"HOME": str(home)}
    there.mkdir()
    for name, more in (("run", []), ("half", ["train.episodes=4"])):
        error = call("train", [*TINY, *more, "data_dir=photos", f"hydra.run.dir={name}"], here, env)
        assert error is None, error
        copies = [here / f"half{number}" for number in range(1, 6)] if name == "half" else [there / "moved"]
        for copy in [home / name, there / name, *copies]:
            shutil.copytree(here / name, copy)
            if name == "half":  # as after an interruption in the test
                (copy / "results.json").unlink()
    for line in LINES:
        typed = [word.replace("ODD", ODD) for word in line.typed.replace(ODD, "ODD").split()]
        error = call(line.program, [*typed, *line.more], top / line.cwd, env | dict(line.env))
        if error is not None:
            yield line, error
        else:
            yield line, "done" if (top / line.leaves).exists() else f"done, but {line.leaves} is missing"


def main() -> None:
    """Print the table."""
    source = next(Path(path) for path in sys.path if (Path(path) / "train.py").is_file())

    def call(program: str, arguments: list[str], cwd: Path, env: dict[str, str]) -> str | None:
        done = programs.call(source / f"{program}.py", arguments, cwd, env, timeout=300)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error")]
        return None if done.returncode == 0 else [*errors, *lines[-1:], "no message"][0]

    with tempfile.TemporaryDirectory() as folder:
        for line, outcome in run_all(call, Path(folder)):
            sys.stdout.write(f"{line}\t{outcome.replace(folder, 'DIR')}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
