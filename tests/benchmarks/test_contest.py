import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.contest import Contest, Entrant, bench, run
from benchmarks.suite import choose
from fewshot.errors import FewShotError
from programs import FORKED

MIB = 2**20


def sleeper(seconds, result=1.0, megabytes=0):
    def work():
        time.sleep(seconds)
        np.ones(megabytes * MIB, dtype=np.uint8)
        return np.array([result, 2.0])

    return work


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Save each entrant's process the imports."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORKED)


def breaker():
    raise ValueError("nothing to build")


def dies(turn):
    turns = iter(range(1, turn))

    def work():
        if next(turns, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([1.0, 2.0])

    return work


def parent():
    child = subprocess.Popen(["sleep", "60"])
    return lambda: np.array([child.pid, 2.0])


def runs(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()  # a zombie has ended
    except FileNotFoundError:
        return False


def contest(*others, **settings):
    return Contest("sleeping", [Entrant("ours", sleeper, {"seconds": 0.01, "megabytes": 64}), *others], **settings)


def test_medians_ratios_and_memory_are_measured_per_entrant(tmp_path, capsys):
    slow = Entrant("slow", sleeper, {"seconds": 0.04})
    bench({"sleep": contest(slow, items=(10, "naps"))}, 3, 600, tmp_path / "deep" / "bench.json")
    report = json.loads((tmp_path / "deep" / "bench.json").read_text())
    ours, other = report["contests"]["sleep"]["entrants"]
    assert len(ours["seconds"]) == len(other["seconds"]) == 3
    assert ours["ratio"] == 1 and other["ratio"] == pytest.approx(other["median"] / ours["median"])
    assert ours["median"] >= 0.01 and other["median"] >= 0.04  # a busy machine may take longer
    assert ours["peak_bytes"] - other["peak_bytes"] > 50 * MIB
    shown = capsys.readouterr().out
    assert "sleeping; 3 rounds" in shown and "naps/s" in shown and "slow" in shown


def test_no_round_begins_after_so_many_seconds_but_there_is_one():
    slow = Entrant("slow", sleeper, {"seconds": 0.2})
    for seconds, rounds in ((0.01, 1), (600, 2)):
        assert [len(entrant["seconds"]) for entrant in run(contest(slow), 2, seconds)] == [rounds, rounds]


def test_an_entrant_with_a_different_result_is_rejected():
    with pytest.raises(FewShotError, match="the results of 'wrong' and 'ours' differ by"):
        run(contest(Entrant("wrong", sleeper, {"seconds": 0, "result": 1.1})), 1)


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up there")
def test_an_entrant_leaves_no_process_of_its_own_behind(monkeypatch):
    agreed = []
    monkeypatch.setattr("benchmarks.contest._compare", lambda _, results: agreed.append(int(results[1][0])))
    run(contest(Entrant("parent", parent)), 1)
    deadline = time.monotonic() + 10
    while runs(agreed[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(agreed[0])


def test_error_names_an_entrant_that_fails():
    with pytest.raises(FewShotError, match=r"'broken' failed: ValueError.'nothing to build'"):
        run(contest(Entrant("broken", breaker)), 1)


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_error_names_an_entrant_whose_process_is_killed(turn):
    with pytest.raises(FewShotError, match="'killed' failed: its process ended; it may have run out of memory"):
        run(contest(Entrant("killed", dies, {"turn": turn})), 3)


def test_error_lists_the_contests_for_an_unknown_name(cli):
    done = cli("only=[mamal]", script="bench.py")
    assert done.returncode == 1
    assert done.stderr.startswith("error: only=mamal is not a benchmark: choose from protonet_omniglot")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_benchmark_needs_a_gpu():
    with pytest.raises(FewShotError, match=r"^device=cuda: .*; choose device=cpu$"):
        choose(None, "cuda")
    with pytest.raises(FewShotError, match="device=gpu must be cpu or cuda"):
        choose(None, "gpu")


def test_a_directory_is_not_taken_for_the_file_of_the_results(tmp_path):
    with pytest.raises(FewShotError, match=rf"out={tmp_path} is a directory; name a file: out={tmp_path}/bench.json"):
        bench({}, 1, 9, tmp_path)
