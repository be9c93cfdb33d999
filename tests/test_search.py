"""The sweeper that searches, with jobs that only compute a number."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from fewshot.config import CONF, compose_unresolved
from fewshot.errors import FewShotError
from hydra_plugins.fewshot_search import Search

pytest.importorskip("optuna", minversion="5", reason="no Optuna: pip install -e '.[optuna]'")
SPACE = ["optimizer.lr=tag(log,interval(1e-5,1e-1))", "shot=int(interval(1,8))", "distance=l2,cosine"]


def search(
    folder: Path,
    *arguments: str,
    n_trials: int = 6,
    n_jobs: int = 1,
    value: Callable[[int, dict[str, str]], float | None] = lambda _, job: float(job["optimizer.lr"]),
) -> dict[int, dict[str, str]]:
    """Search, and return the settings of each job by its number; ``value`` computes what a job returns."""
    given = OmegaConf.load(CONF / "hydra" / "sweeper" / "search.yaml")
    sweeper = Search(n_trials, n_jobs, given.sampler, given.params)
    sweeper.folder, sweeper.loader = folder, None
    ran: dict[int, dict[str, str]] = {}

    def launch(batch: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        assert len(batch) <= n_jobs
        returns = []
        for number, overrides in enumerate(batch, initial_job_idx):
            assert number not in ran
            ran[number] = dict(override.split("=", 1) for override in overrides)
            result = JobReturn(status=JobStatus.COMPLETED)
            result.return_value = value(number, ran[number])
            returns.append(result)
        return returns

    sweeper.launcher = SimpleNamespace(launch=launch)  # type: ignore[assignment]
    try:
        sweeper.sweep([*SPACE, *arguments])
    except KeyboardInterrupt:
        ran["interrupted"] = {}  # type: ignore[index]
    return ran


def test_jobs_differ_in_what_is_searched_over_and_the_best_is_recorded(tmp_path, capsys):
    ran = search(tmp_path, "seed=3", "resume=auto")
    assert list(ran) == [*range(6)]
    assert all(job["seed"] == "3" and job["resume"] == "auto" for job in ran.values())
    rates = {job["optimizer.lr"] for job in ran.values()}
    assert len(rates) == 6 and all(re.fullmatch(r"[\d.]+(e-05)?", rate) for rate in rates)
    assert all(sum(map(str.isdigit, rate.split("e")[0].strip("0.").lstrip("0"))) <= 4 for rate in rates)
    assert {int(job["shot"]) for job in ran.values()} <= {*range(1, 9)}
    assert {job["distance"] for job in ran.values()} == {"l2", "cosine"}
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == best.best_params["optimizer.lr"] == max(map(float, rates))
    assert ran[best.best_job]["optimizer.lr"] == str(best.best_params["optimizer.lr"])
    shown = capsys.readouterr()
    assert shown.out.startswith(f"best: job {best.best_job} with optimizer.lr=") and shown.out.count("\n") == 1
    assert shown.err == ""


@pytest.mark.parametrize("n_jobs", [1, 3])
@pytest.mark.parametrize("at", [0, 4, 12])
def test_an_interrupted_search_is_resumed_where_it_was(tmp_path, n_jobs, at):
    def interrupted(number: int, job: dict[str, str]) -> float:
        if number == at:
            raise KeyboardInterrupt
        return float(job["optimizer.lr"])

    whole = search(tmp_path / "whole", n_trials=14, n_jobs=n_jobs)
    first = search(tmp_path / "parts", n_trials=14, n_jobs=n_jobs, value=interrupted)
    assert "interrupted" in first
    second = search(tmp_path / "parts", "resume=auto", n_trials=14, n_jobs=n_jobs)
    assert list(second) == [*range(at - at % n_jobs, 14)]  # a batch has no values until all of it is done
    for number, job in whole.items():
        for part in (first, second):
            assert part.get(number, job).items() >= job.items()
    assert search(tmp_path / "parts", n_trials=14, n_jobs=n_jobs) == {}
    assert list(search(tmp_path / "parts", n_trials=16, n_jobs=n_jobs)) == [14, 15]


def test_failed_jobs_are_run_again_when_the_search_is_resumed(tmp_path):
    ran = search(tmp_path, n_jobs=2, value=lambda number, _: None if number in (0, 1, 3) else 0.5)
    assert list(ran) == [*range(6)]
    again = search(tmp_path, n_jobs=2, value=lambda number, _: None if number == 1 else 0.1)
    assert again == {number: ran[number] for number in (0, 1, 3)}
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_value == 0.5


def test_a_search_without_a_value_has_no_best_job(tmp_path):
    assert len(search(tmp_path, value=lambda *_: None)) == 6
    assert not (tmp_path / "optimization_results.yaml").exists()


def test_a_job_that_was_killed_while_it_was_chosen_is_replaced(tmp_path):
    import optuna  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend  # noqa: PLC0415

    search(tmp_path, n_trials=2)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    optuna.load_study(study_name="search", storage=storage).ask().suggest_int("way", 2, 5)
    assert list(search(tmp_path, n_trials=4)) == [3, 4]


@pytest.mark.parametrize("argument", ["seed=4", "optimizer.lr=interval(1e-5,1e-2)", "logger=none"])
def test_another_search_in_the_directory_is_rejected(tmp_path, argument):
    search(tmp_path, "cache_dir=a", n_trials=1)
    if argument == "logger=none":
        assert len(search(tmp_path, argument, "data_dir=b")) == 5  # nothing that a result depends on
        return
    with pytest.raises(FewShotError, match=f"different settings: .*{re.escape(argument)}.* in one of the two"):
        search(tmp_path, argument)


@pytest.mark.parametrize("damage", [lambda text: text[:40], lambda text: text[50:], lambda _: '{"op_code": 4}\n'])
def test_a_broken_study_is_named(tmp_path, damage):
    search(tmp_path, n_trials=1)
    study = tmp_path / "study.log"
    study.write_text(damage(study.read_text()) + "\n")
    with pytest.raises(FewShotError, match=r"study\.log is broken .*; delete it"):
        search(tmp_path)
    study.unlink()
    assert len(search(tmp_path)) == 6


def test_a_study_behind_a_link_is_rejected(tmp_path):
    (tmp_path / "study.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FewShotError, match="is a link"):
        search(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer.lr=interval(1,0.1)", "low <= high"),
        ("optimizer.lr=tag(log,interval(0,0.1))", "log"),
    ],
)
def test_an_interval_that_holds_nothing_is_rejected(tmp_path, argument, message):
    with pytest.raises(FewShotError, match=rf"{re.escape(argument)}: .*{message}"):
        search(tmp_path, argument)


def test_nothing_to_search_over_is_rejected(tmp_path):
    with pytest.raises(FewShotError, match="nothing to search over"):
        search(tmp_path, "optimizer.lr=1", "shot=1", "distance=l2")


def test_ranges_and_settings_in_files_are_searched_over(tmp_path):
    sweeper = compose_unresolved("hydra/sweeper=search", "+hydra.sweeper.params.way='range(2,12,3)'").hydra.sweeper
    assert sweeper._target_ == f"{Search.__module__}.{Search.__name__}"
    ran = search(tmp_path, f"way={sweeper.params.way}", n_trials=12)
    assert {job["way"] for job in ran.values()} == {"2", "5", "8", "11"}
