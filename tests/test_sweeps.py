import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from omegaconf import OmegaConf
from PIL import Image

from fewshot import cli as command_line
from fewshot.config import CONF, ROOT, SWEPT, compose, compose_unresolved, trains_on
from fewshot.sweeps import FAILURE, Sweep, as_csv, draw, failures, read_jobs, tabulate
from fewshot.text import say

TINY = [
    *("train.episodes=4", "train.way=5", "train.query=1", "query=3", "val.every=2", "val.episodes=3"),
    *("test.episodes=5", "encoder.filters=8", "hardware=cpu", "pictures=false"),
]


def write_job(folder: Path, overrides: list[str], accuracy: float, **other) -> None:
    result = {
        **{"dataset": "glyphs", "method": "protonet", "way": 5, "shot": 1, "seed": 0, "train_seconds": 1.0},
        **{"accuracy": accuracy, "ci95": 0.01, "episodes": 10, "overrides": overrides},
        "validations": [
            {"trained_episodes": step, "accuracy": accuracy - 0.05 * step, "ci95": 0.02} for step in (2, 1, 3)
        ],
        "config": {"train": {"episodes": 3}},
        **other,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(result))


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch):
    """Reset the class attributes that a test may have set."""
    monkeypatch.setattr(Sweep, "folder", None)
    monkeypatch.setattr(Sweep, "again", "")
    monkeypatch.setenv(SWEPT, "")


def test_jobs_are_listed_in_order_with_their_swept_settings(tmp_path):
    for number in range(11):
        resumed = ["resume=auto"] if number > 5 else []  # as after an interruption
        swept = [f"optimizer.lr={number}", *(["+experiment/x=a"] if number == 2 else [])]
        write_job(tmp_path / str(number), ["seed=0", *resumed, *swept], 0.5 + number / 100)
    write_job(tmp_path / "11", ["seed=0", "optimizer.lr=11"], 0.5, validations=[])
    jobs = read_jobs(tmp_path)
    assert [job.name for job in jobs] == [str(number) for number in range(12)]
    assert jobs[2].swept == {"optimizer.lr": "2", "experiment/x": "a"}
    assert jobs[10].swept == {"optimizer.lr": "10", "experiment/x": ""}
    assert jobs[10].test == pytest.approx((60, 1)) and jobs[10].validation == pytest.approx((55, 2))
    table = tabulate(jobs)
    assert [str(column.header) for column in table.columns] == [
        *("job", "optimizer.lr", "experiment/x", "validation", "test")
    ]
    assert list(map(str, table.columns[3].cells))[10:] == ["55.00 ± 2.00", ""]
    assert str(next(iter(table.columns[4].cells))) == "50.00 ± 1.00"
    assert Image.open(draw(jobs, tmp_path / "sweep.png")).height > 700
    assert Image.open(draw(jobs * 200, tmp_path / "sweep.png")).height < 2**14
    (tmp_path / "results.csv").write_text(as_csv(jobs))
    frame = pandas.read_csv(tmp_path / "results.csv")
    assert list(frame.columns[:6]) == ["job", "optimizer.lr", "experiment/x", "dataset", "method", "way"]
    assert list(frame["optimizer.lr"]) == [*range(12)] and frame.accuracy[10] == 0.6 and frame.seed.sum() == 0
    assert list(frame["experiment/x"].dropna()) == ["a"]


def test_results_are_read_by_pandas(tmp_path):
    write_job(tmp_path / "0", ["seed=0"], 0.5)
    series = pandas.read_json(tmp_path / "0" / "results.json", typ="series")
    assert series.accuracy == 0.5 and len(pandas.DataFrame(series.validations)) == 3


def test_evaluations_count_as_jobs_only_if_nothing_was_trained(tmp_path):
    write_job(tmp_path / "0", ["optimizer.lr=0"], 0.5)
    write_job(tmp_path / "0" / "again", ["optimizer.lr=0"], 0.9, checkpoint="0/checkpoints/last.ckpt", weights="last")
    assert [job.name for job in read_jobs(tmp_path)] == ["0"]
    assert [job.name for job in read_jobs(tmp_path / "0" / "again")] == ["."]


def test_names_of_jobs_and_settings_are_escaped(tmp_path, capsys):
    odd = "x=[red]$_{[/lab]}$ \x1b[2J\n| y"
    write_job(tmp_path / "[bold]0", ["method.learning_rate=1", odd], 0.5)
    write_job(tmp_path / "[/lab]1", ["_y=2", "+z=$\\frac$"], 0.6)
    jobs = read_jobs(tmp_path)
    say(tabulate(jobs))
    shown = capsys.readouterr().out
    assert "[bold]0" in shown and "[/lab]1" in shown and "\x1b" not in shown and "\\x1b[2J\\n" in shown
    draw(jobs, tmp_path / "sweep.png")
    written = {row["job"]: row for row in csv.DictReader(as_csv(jobs).splitlines())}
    assert written["[bold]0"]["x"] == "[red]$_{[/lab]}$ \\x1b[2J\\n| y" and written["[/lab]1"]["_y"] == "2"
    (tmp_path / "[bold]0" / FAILURE).write_bytes(b"way=1: \xff\x1b[2J")
    Sweep.folder = tmp_path
    with pytest.raises(SystemExit):
        command_line._exit_if_jobs_failed()
    assert capsys.readouterr().err.splitlines() == ["error: 1 of the jobs failed", "way=1: \ufffd\\x1b[2J"]


def test_a_sweep_of_one_job_is_summarised_too(tmp_path):
    write_job(tmp_path / "0", ["seed=0"], 0.5)
    (job,) = read_jobs(tmp_path)
    assert job.swept == {}
    draw([job], tmp_path / "sweep.png")


def test_failure_notes_are_deleted_when_the_sweep_is_resumed(tmp_path):
    for number in (2, 10):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / FAILURE).write_text(f"way={number}: no")
    assert failures(tmp_path) == ["way=2: no", "way=10: no"]
    config = OmegaConf.create({"resume": None, "hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": {}}})
    Sweep().on_multirun_start(config)
    assert failures(tmp_path) == []


def test_a_run_is_named_by_what_its_sweep_varies(tmp_path):
    typed = ["distance=l2,cosine", "optimizer.lr=0.1,0.2", "experiment=choice(a/b,c)", "train.episodes=4", "seed=3"]
    hydra = {"sweep": {"dir": str(tmp_path)}, "sweeper": {"params": {"query": "1,2"}}, "overrides": {"task": typed}}
    Sweep().on_multirun_start(OmegaConf.create({"hydra": hydra}))
    own = ["distance=cosine", "optimizer.lr=0.1", "train.episodes=4", "seed=3", "query=2", "method=maml"]
    assert compose(*own[:4]).name == "protonet-cosine-5way-1shot-seed3-lr=0.1"
    assert compose(*own[1:]).name == "maml-5way-1shot-seed3-lr=0.1-query=2"
    assert compose("name=mine").name == "mine"


def test_direction_minimize_is_rejected(tmp_path):
    sweeper = {"direction": "Direction.minimize"}
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": sweeper}})
    with pytest.raises(SystemExit, match="hydra/sweeper=search"):
        Sweep().on_multirun_start(config)


def test_a_glob_that_matches_nothing_is_rejected(tmp_path):
    typed = ["way=5", "+experiment/omniglot=glob(protonet_5way_*)"]
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": typed}}})
    with pytest.raises(SystemExit, match=r"glob\(protonet_5way_\*\) matches none of maml_1st, .*protonet$"):
        Sweep().on_multirun_start(config)


def test_jobs_that_would_write_over_each_other_are_rejected(tmp_path):
    typed = ["way=5,20", f"out={tmp_path / 'out'}"]
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": typed}}})
    with pytest.raises(SystemExit, match=r"every job of the sweep would write there; leave it out"):
        Sweep().on_multirun_start(config)


def test_evaluations_sweep_into_one_directory(cli, run, tmp_path):
    episodes = 'episodes="${by:{simpleshot:4,tim:5}}"'
    sweep, one = tmp_path / "sweep", ["query=3", episodes, "way=4", "method=simpleshot,tim"]
    done = cli("-m", f"checkpoint={run('protonet')}", *one, f"hydra.sweep.dir={sweep}", script="evaluate.py")
    assert done.returncode == 0 and "Callback" not in done.stderr, done.stderr
    frame = pandas.read_csv(sweep / "results.csv")
    assert list(frame.method) == ["simpleshot", "tim"] and list(frame.episodes) == [4, 5]
    assert (frame.test_seconds_per_episode > 0).all()
    assert list(frame.transductive) == list(frame.assumes_balance) == [False, True]
    assert {path.name for path in (sweep / "1").iterdir()} == {"results.json", "episodes.csv", "confusion.png"}
    assert (sweep / "sweep.png").exists()


def test_a_failure_that_cannot_be_recorded_is_raised(tmp_path, monkeypatch):
    config = OmegaConf.create(
        {"mode": "MULTIRUN", "runtime": {"output_dir": str(tmp_path / "none")}, "overrides": {"task": ["way=1"]}}
    )
    monkeypatch.setattr(command_line, "HydraConfig", SimpleNamespace(get=lambda: config, initialized=lambda: False))

    def fail():
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        command_line._note_failure(fail)
    (tmp_path / "none").mkdir()
    assert command_line._note_failure(fail) is None
    assert failures(tmp_path) == ["way=1: ValueError('why')"]


@pytest.mark.parametrize("name", [path.stem for path in CONF.glob("*.yaml")])
def test_every_entry_point_reports_failed_jobs(name):
    assert compose_unresolved(name=name).hydra.callbacks.sweep._target_ == "fewshot.sweeps.Sweep"


@pytest.mark.slow
def test_every_method_sweeps_over_shot_and_way(cli, tmp_path):
    grid = ["method=protonet,matching,maml", "shot=1,5", "way=5,20"]
    tiny = [setting for setting in TINY if setting != "train.way=5"]
    done = cli(
        "-m", *grid, *tiny, "train.episodes=1", "val.episodes=2", "test.episodes=2", f"hydra.sweep.dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"│ (\d+) +│ (\w+) +│ (\d+) +│ (\d+) +│ +[\d.]+ ± +[\d.]+ +│ +[\d.]+ ± +[\d.]+ +│", done.stdout)
    expected = [
        (method, shot, way) for method in ("protonet", "matching", "maml") for shot in "15" for way in ("5", "20")
    ]
    assert listed == [(str(number), *job) for number, job in enumerate(expected)]
    assert Image.open(tmp_path / "sweep.png").width > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "setting"),
    [
        ("joblib", "hydra.launcher.n_jobs=2"),
        ("submitit_local", "hydra.launcher.timeout_min=10"),
        ("ray", "+hydra.launcher.ray.init.num_cpus=2"),
    ],
)
def test_jobs_of_other_processes_are_summarised_and_failures_reported(cli, tmp_path, launcher, setting):
    plugin = launcher.partition("_")[0]
    pytest.importorskip(
        f"hydra_plugins.hydra_{plugin}_launcher", reason=f"no {plugin} launcher: pip install -e '.[{plugin}]'"
    )
    done = cli("-m", f"hydra/launcher={launcher}", setting, *TINY, "way=5,1", f"hydra.sweep.dir={tmp_path}", fresh=True)
    assert done.returncode == 1
    assert re.search(r"│ 0 +│ +[\d.]+ ± +[\d.]+ +│ +[\d.]+ ± +[\d.]+ +│", done.stdout)
    assert list(pandas.read_csv(tmp_path / "results.csv").job) == [0]
    first, failed = [line for line in done.stderr.splitlines() if "_run_job" not in line][-2:]
    assert first == "error: 1 of the jobs failed" and failed.endswith("way=1 must be a whole number of at least 2")
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_shares_the_jobs(cli, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="no ray launcher: pip install -e '.[ray]'")
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        connect = (
            f"hydra.launcher.ray.init.address={cluster.address}",
            "+hydra.launcher.ray.init.object_store_memory=null",
        )
        sweep = ["-m", "hydra/launcher=ray", *connect, *TINY, "seed=0,1,2,3", f"hydra.sweep.dir={tmp_path}"]
        done = cli(*sweep, fresh=True)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    assert list(pandas.read_csv(tmp_path / "results.csv").job) == [0, 1, 2, 3]


LONGER = [*TINY, "train.episodes=60", "val.every=30", "checkpoint_every=2"]


def interrupt(sweep: list[str], job: Path, cache_dir: Path) -> None:
    """Start a sweep, press Ctrl-C in one of its jobs, and check what it says."""
    command = [sys.executable, str(ROOT / "src" / "train.py"), *sweep, f"cache_dir={cache_dir}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not (job / "checkpoints" / "last.ckpt").exists():
            assert running.poll() is None
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    again = f"hydra.sweep.dir={job.parent} resume=auto"
    said = f"error: interrupted; resume the sweep with the same command and {again}"
    assert errors.strip().splitlines()[-1] == said
    assert not (job / "results.json").exists()


@pytest.mark.parametrize(
    ("module", "name", "lost"),
    [
        ("hydra_plugins.hydra_ray_launcher._core", "LocalRayletDiedError", True),
        ("hydra_plugins.hydra_ray_launcher._core", "ValueError", False),
        ("fewshot.training", "LocalRayletDiedError", False),
    ],
)
def test_only_a_launcher_that_loses_its_jobs_ends_in_a_line(monkeypatch, module, name, lost):
    monkeypatch.setattr(Sweep, "folder", Path("sweep"))
    monkeypatch.setattr(Sweep, "again", "hydra.sweep.dir=sweep resume=auto")
    code = "def launch():\n    raise Error('the node is gone.\\nmore')"
    exec(code, scope := {"__name__": module, "Error": type(name, (Exception,), {})})
    with pytest.raises(Exception, match="the node is gone") as raised:
        scope["launch"]()
    said = f"{name}: the node is gone; resume the sweep with the same command and hydra.sweep.dir=sweep resume=auto"
    assert command_line._lost_jobs(raised.value) == (said if lost else None)


@pytest.mark.slow
def test_a_sweep_with_a_killed_process_says_how_to_resume(cli, cache_dir, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="no joblib launcher: pip install -e '.[joblib]'")
    parallel = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    sweep = [*parallel, *LONGER, "seed=0,1", f"hydra.sweep.dir={tmp_path}", "resume=auto"]
    command = [sys.executable, str(ROOT / "src" / "train.py"), *sweep, f"cache_dir={cache_dir}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not (tmp_path / "0" / "checkpoints" / "last.ckpt").exists():
            assert running.poll() is None
            time.sleep(0.1)
        subprocess.run(["pkill", "-KILL", "-P", str(running.pid), "-f", "LokyProcess"], check=True)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: TerminatedWorkerError: ") and "Traceback" not in errors
    assert last.endswith(f"; resume the sweep with the same command and hydra.sweep.dir={tmp_path} resume=auto")
    done = cli(*sweep, fresh=True)
    assert done.returncode == 0, done.stderr
    assert len(read_jobs(tmp_path)) == 2


@pytest.mark.slow
def test_an_interrupted_search_is_resumed_and_maximises_validation_accuracy(cli, cache_dir, tmp_path):
    pytest.importorskip("optuna", minversion="5", reason="no Optuna: pip install -e '.[optuna]'")
    search = ["-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=3", *LONGER, "train.shot=1,2,99"]
    search += ["optimizer.lr=tag(log,interval(0.0001,0.1))", f"hydra.sweep.dir={tmp_path}", "resume=auto"]
    interrupt(search, tmp_path / "0", cache_dir)
    first, again = (cli(*search) for _ in range(2))
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("results.json")}
    failed = failures(tmp_path)
    assert len(found) + len(failed) == 3 and 0 < len(failed) < 3
    best = max(found, key=lambda job: found[job]["val_accuracy"])
    chosen = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert (str(chosen.best_job), chosen.best_value) == (best, found[best]["val_accuracy"])
    assert chosen.best_params["optimizer.lr"] == found[best]["config"]["optimizer"]["lr"]
    for done in (first, again):
        assert done.returncode == 1 and f"error: {len(failed)} of the jobs failed" in done.stderr
        assert "Traceback" not in done.stderr and "[I 2" not in done.stdout + done.stderr
    assert "episode 60: validation accuracy" in first.stdout
    assert "episode 60: validation accuracy" not in again.stdout


@pytest.mark.slow
def test_an_interrupted_sweep_is_resumed(cli, cache_dir, tmp_path):
    sweep = ["-m", *LONGER, "seed=0,1", f"hydra.sweep.dir={tmp_path}", "resume=auto"]
    interrupt(sweep, tmp_path / "0", cache_dir)
    done = cli(*sweep)
    assert done.returncode == 0, done.stderr
    assert len(read_jobs(tmp_path)) == 2


def test_the_study_of_classifiers_has_all_of_them():
    study = compose_unresolved("study=classifiers", name="evaluate").hydra.sweeper.params
    methods = study.method.split(",")
    untrained = {path.stem for path in (CONF / "method").glob("*.yaml") if "Needs no training" in path.read_text()}
    # method=auto is for photos of one's own: it chooses among others for each support set.
    assert {*methods} == {"protonet", *untrained} - {"auto"} and len(methods) == len(set(methods))
    slow = {"alpha_tim": (1000, 1000), "tim": (10_000, 1000), "simpleshot": (10_000, 10_000)}
    for method, episodes in slow.items():
        config = [compose(f"method={method}", f"way={way}", "study=classifiers", name="evaluate") for way in (5, 20)]
        assert tuple(one.episodes for one in config) == episodes
    for method in methods:
        assert trains_on(compose(f"method={method}")) == ("episodes" if method == "protonet" else "nothing")
