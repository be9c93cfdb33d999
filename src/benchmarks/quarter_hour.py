"""Use a GPU that is there for a quarter of an hour: run the GPU suite, the benchmark, and trainings in the time left.

Run it again with the same ``--out`` to continue: what is complete is skipped, and trainings resume.

    python src/benchmarks/quarter_hour.py --out outputs/gpu --minutes 15
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))

from fewshot.errors import FewShotError  # noqa: E402
from fewshot.text import say  # noqa: E402

SUITE, BENCH, GRACE = 240, 180, 25  # most seconds for the suite, the benchmark, and the last checkpoint of a training
# Experiments in the order in which they start, at the paper's budget unless overrides say otherwise. With all tasks of
# a meta-batch in one vmap, a GPU launches the fewest kernels.
TRAININGS: Mapping[str, Sequence[str]] = {
    "miniimagenet/classifier": (),
    "omniglot/maml_1st_20way_5shot": ("budget=cpu",),
    "omniglot/maml_2nd_20way_5shot": ("budget=cpu",),
    "omniglot/maml_2nd_20way_1shot": ("budget=cpu",),
    "miniimagenet/protonet_5way_1shot": (),
    "miniimagenet/protonet_5way_5shot": (),
    "miniimagenet/matching_l2_5way_1shot": (),
    "miniimagenet/matching_fce_cosine_5way_5shot": (),
    "miniimagenet/matching_fce_cosine_5way_1shot": (),
    "miniimagenet/matching_cosine_5way_1shot": (),
    "miniimagenet/matching_scaled_cosine_5way_1shot": (),
    "miniimagenet/maml_1st_5way_1shot": (),
    "miniimagenet/maml_2nd_5way_1shot": (),
    "omniglot/protonet_20way_1shot": (),
    "omniglot/protonet_20way_5shot": (),
    "omniglot/maml_2nd_5way_1shot": ("method.vmap_tasks=32",),
    "omniglot/maml_1st_5way_1shot": ("method.vmap_tasks=32",),
}
# Parts of the suite, which run at the same time: one process leaves a GPU mostly idle.
SUITE_PARTS = ("stops_resumes", "of_the_cpu", "never_waits", "not (stops_resumes or of_the_cpu or never_waits)")
TINY = [
    *("dataset=glyphs", "way=5", "train.episodes=8", "train.query=2", "query=2", "val.every=8", "val.episodes=2"),
    *("test.episodes=4", "encoder.filters=4", "hardware=cpu", "pictures=false"),
]


class Stage:
    """A command with its log.

    Args:
        name: for messages, and the name of the log below ``out``.
        command: arguments of Python.
        out: where logs are written.
    """

    def __init__(self, name: str, command: Sequence[str], out: Path) -> None:
        self.name, self.started = name, time.monotonic()
        self.log = out / f"{name.replace('/', '_')}.txt"
        with self.log.open("a", encoding="utf-8") as log:
            # A new session: a signal reaches its worker processes, too, and Ctrl-C only this program. (The programs of
            # the benchmark are in groups of their own, and end when they find the benchmark gone.)
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Wait at most so long; return the exit status, None if it still runs."""
        try:
            return self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask it to stop, and kill what still runs after ``GRACE`` seconds."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        if self.wait(GRACE) is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def report(self, status: int | None) -> None:
        """Print how it ended."""
        words = {0: "done", None: "out of time"}.get(status, f"failed with status {status}, see {self.log}")
        say(f"{self.name}: {words} after {time.monotonic() - self.started:.0f} s")


def run_once(commands: Mapping[str, Sequence[str]], out: Path, seconds: float) -> bool:
    """Run stages at the same time, by name, but for those complete before; return whether all are now."""
    deadline = time.monotonic() + seconds
    stages = []
    for name, command in commands.items():
        if (out / f"{name}.done").exists():
            say(f"{name}: was complete before")
        else:
            stages.append(Stage(name, command, out))
    complete = True
    for stage in stages:
        status = stage.wait(deadline - time.monotonic())
        stage.report(status)
        stage.stop()
        if status == 0:
            (out / f"{stage.name}.done").touch()
        complete &= status == 0
    return complete


def train_all(
    out: Path, deadline: float, together: int, dry_run: bool, only: Sequence[str], seeds: Sequence[int]
) -> bool:
    """Train experiments until the deadline, several at a time; return whether none failed."""
    waiting = [(experiment, seed) for seed in seeds for experiment in only]
    running: list[Stage] = []
    failed = False
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < together:
            experiment, seed = waiting.pop(0)
            hardware = TINY if dry_run else ["hardware=gpu", "logger=csv"]
            own = [f"experiment={experiment}", f"seed={seed}", *TRAININGS[experiment]]
            overrides = [*own, *hardware, "resume=auto"]
            if dry_run and "maml" in experiment:
                overrides.append("train.meta_batch=2")
            directory = out / "runs" / experiment / str(seed)
            command = ["src/train.py", *overrides, f"hydra.run.dir={directory.resolve()}"]
            running.append(Stage(f"{experiment}/{seed}", command, out))
        time.sleep(0.2)
        for stage in [stage for stage in running if stage.process.poll() is not None]:
            running.remove(stage)
            stage.report(stage.process.returncode)
            failed = failed or stage.process.returncode != 0
    for stage in running:
        stage.process.send_signal(signal.SIGTERM)  # all at once: each writes a checkpoint
    for stage in running:
        stage.stop()
        stage.report(None)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; return 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="directory of logs and runs")
    parser.add_argument("--minutes", type=float, default=15, help="time for everything")
    parser.add_argument("--together", type=int, default=4, help="trainings at a time: one leaves a GPU half idle")
    parser.add_argument("--only", nargs="+", default=list(TRAININGS), choices=TRAININGS, help="which trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the trainings")
    parser.add_argument("--dry-run", action="store_true", help="try everything on the CPU, with tiny budgets")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    deadline = time.monotonic() + 60 * options.minutes - GRACE
    out.mkdir(parents=True, exist_ok=True)
    if not options.dry_run:
        import torch  # noqa: PLC0415

        from fewshot.hardware import why_no_gpu  # noqa: PLC0415

        if not torch.cuda.is_available():
            raise FewShotError(f"{why_no_gpu()}; try the script with --dry-run")
        end = time.strftime("%X", time.localtime(time.time() + 60 * options.minutes))
        say(f"on {torch.cuda.get_device_name()}, until {end}")

    suite = ["-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", "--durations=10", "-vv"]
    bench = ["src/bench.py", f"out={out / 'bench.json'}"]
    if options.dry_run:
        parts = {"suite": [*suite, "-k", "loss_scale or every_method_that_trains"]}
        bench += ["only=[episodes]", "rounds=1"]
    else:
        parts = {f"suite{number}": [*suite, "-k", tests] for number, tests in enumerate(SUITE_PARTS, 1)}
        bench += ["device=cuda", "rounds=3"]
    limits = (SUITE, BENCH) if not options.dry_run else (math.inf, math.inf)
    complete = run_once(parts, out, min(limits[0], deadline - time.monotonic()))
    complete &= run_once({"bench": bench}, out, min(limits[1], deadline - time.monotonic()))
    complete &= train_all(out, deadline, options.together, options.dry_run, options.only, options.seeds)
    if any(out.glob("runs/**/results.json")):
        runs = f"runs=[{out / 'runs'},{ROOT / 'notebooks' / 'results' / 'reproduction'}]"
        report = Stage("report", ["src/report.py", runs, f"out={out / 'report'}"], out)
        status = report.wait(120)
        report.report(status)
        report.stop()
        complete &= status == 0
    return 0 if complete else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewShotError as error:
        sys.exit(f"error: {error}")
