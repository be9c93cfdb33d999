import pytest
import torch
from torch import nn

from benchmarks.contest import Contest, Entrant, show
from benchmarks.profiling import KINDS_AND_ELSE, OTHER, convolution_peak, count, memory_peak, profile_step, union


@pytest.fixture
def step():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    optimizer, images = torch.optim.Adam(model.parameters()), torch.randn(5, 2, 8, 8)

    def work() -> None:
        model(images).square().sum().backward()
        optimizer.step()

    return work


def test_all_of_the_time_is_attributed_and_operations_are_counted(step):
    found = profile_step(step, rounds=3)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert list(found.shares) == list(KINDS_AND_ELSE)
    for kind in ("convolution", "batch norm", "pooling", "ReLU", "Adam"):
        assert 0 < found.shares[kind] < 1
    assert found.shares["distance and loss"] == 0
    assert found.shares[OTHER] < 0.5
    forward = 2 * (5 * 8 * 8) * 4 * (2 * 3 * 3)
    assert found.flops == 2 * forward  # forward and weight gradient; the images need no gradient
    assert found.seconds > 0


def test_the_peaks_are_plausible():
    assert 1e8 < convolution_peak(rounds=1) < 1e15
    assert 1e8 < memory_peak(rounds=1) < 1e13


def test_operations_and_bytes_are_counted():
    a, b = torch.ones(3, 4), torch.ones(4, 5)

    def work() -> None:
        (a @ b).T.relu_()

    assert count(work) == (2 * 3 * 4 * 5, 4 * (12 + 20 + 15 + 2 * 15))


def test_a_contest_says_how_long_what_was_counted_takes_at_peak_speed(capsys):
    contest = Contest("steps", [Entrant("ours", lambda: None)], counted=0)
    result = {"name": "ours", "seconds": [0.5], "median": 0.5, "ratio": 1.0, "peak_bytes": 1}
    show(contest, [{**result, "flops": 2e9, "bytes": 2**30}], 4e9, 2**31)
    shown = " ".join(capsys.readouterr().out.split())
    assert "'ours': 2 GFLOP, which take 500 ms at 4 GFLOP/s" in shown
    assert "1 GiB read and written, which take 500 ms at 2 GiB/s" in shown


def test_the_time_in_which_a_gpu_is_busy_counts_once():
    assert union([]) == 0
    assert union([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5


def test_a_gpu_contest_reports_the_share_in_which_the_gpu_is_idle(capsys):
    contest = Contest("steps", [Entrant("ours", lambda: None)])
    result = {"name": "ours", "seconds": [0.5], "median": 0.5, "ratio": 1.0, "peak_bytes": 2**20}
    show(contest, [{**result, "idle": 0.25}])
    assert "GPU idle" in (shown := capsys.readouterr().out) and "25%" in shown
    show(contest, [result])
    assert "GPU idle" not in capsys.readouterr().out
