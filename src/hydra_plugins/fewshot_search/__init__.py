"""Hydra's sweeper for ``hydra/sweeper=search``: Optuna chooses the settings of a sweep's jobs.

Hydra imports its plugins whenever it starts, so this module imports Optuna only when it searches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fewshot.errors import FewShotError, reason
from fewshot.paths import install
from fewshot.text import say

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

# Settings that do not change what a job returns, so a search may be resumed with others.
NEUTRAL = ("resume", "data_dir", "cache_dir", "hardware", "logger", "callbacks", "checkpoint_every", "pictures")


class Search(Sweeper):
    """Searches for the settings with which a job returns the highest value.

    ``study.log`` in the sweep's directory records each job with its settings and its value. The same command in the
    same directory resumes the search: it first runs the jobs again that have no value yet.

    Args:
        n_trials: jobs in total, also over several calls.
        n_jobs: jobs that are chosen together, for launchers that run several at once.
        sampler: configuration of the Optuna sampler.
        params: overrides to search over, in addition to those of the command line.
    """

    def __init__(self, n_trials: int, n_jobs: int, sampler: DictConfig, params: DictConfig) -> None:
        self.n_trials, self.n_jobs, self.sampler, self.params = n_trials, n_jobs, sampler, params
        self.launcher: Launcher
        self.loader: ConfigLoader | None
        self.folder: Path

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare the launcher; Hydra calls this first."""
        self.loader, self.folder = hydra_context.config_loader, Path(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs, and write the best settings to ``optimization_results.yaml``.

        Args:
            arguments: overrides; those with an interval or several values are searched over.

        Raises:
            FewShotError: Optuna is not installed, there is nothing to search over, or the directory contains a
                different search.
        """
        lines = [*(f"{key!s}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(lines)
        overrides = {override.get_key_element(): override for override in parsed}
        swept = {key: override for key, override in overrides.items() if override.is_sweep_override()}
        try:
            space = {key: _distribution(override) for key, override in swept.items()}
        except ImportError as error:
            raise FewShotError(f"hydra/sweeper=search needs Optuna 5: {install('optuna')}") from error
        if not space:
            raise FewShotError(
                "there is nothing to search over: add an interval or several values, for example "
                "'optimizer.lr=tag(log,interval(1e-4,1e-2))'"
            )
        fixed = [str(override.input_line) for key, override in overrides.items() if key not in space]
        study = _open_study(self.folder / "study.log", list(overrides.values()))
        tried: set[int] = set()
        while jobs := self._next_jobs(study, space, tried):
            tried.update(job.number for job in jobs)
            batch = [[*(f"{key}={value}" for key, value in _settings(job).items()), *fixed] for job in jobs]
            returns = self.launcher.launch(batch, initial_job_idx=jobs[0].number)
            for job, returned in zip(jobs, returns, strict=True):
                value = _value(returned)
                if value is not None:  # otherwise it failed, and is run again when the search is resumed
                    study.tell(job.number, value)
        if any(job.value is not None for job in study.trials):
            best = study.best_trial
            settings = " ".join(f"{key}={value}" for key, value in _settings(best).items())
            say(f"best: job {best.number} with {settings}")
            found = {"best_job": best.number, "best_value": best.value, "best_params": _settings(best)}
            OmegaConf.save(OmegaConf.create(found), self.folder / "optimization_results.yaml")

    def _next_jobs(
        self, study: "Study", space: Mapping[str, "BaseDistribution"], tried: set[int]
    ) -> "list[FrozenTrial]":
        """Return jobs with consecutive numbers: those without a value that were not tried yet, else new ones."""
        from optuna.trial import TrialState  # noqa: PLC0415

        for job in study.get_trials(states=[TrialState.RUNNING]):
            if job.distributions != space:  # a kill came before all of its settings were chosen
                study.tell(job.number, state=TrialState.FAIL)
        jobs = study.get_trials(states=[TrialState.RUNNING, TrialState.COMPLETE])
        rest = [job for job in jobs if job.value is None and job.number not in tried][: self.n_jobs]
        if rest:
            return [job for place, job in enumerate(rest) if job.number == rest[0].number + place]
        # A new seed for each batch, because a resumed search starts with a new sampler.
        seed = {"seed": self.sampler.seed + len(study.trials)} if self.sampler.get("seed") is not None else {}
        study.sampler = instantiate(self.sampler, **seed)
        new = [study.ask(dict(space)).number for _ in range(min(self.n_jobs, self.n_trials - len(jobs)))]
        return [job for job in study.trials if job.number in new]


def _open_study(path: Path, overrides: list[Override]) -> "Study":
    """Return the study in a file, a new one if there is none.

    Raises:
        FewShotError: it is broken, or a search with other overrides.
    """
    import optuna  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    decisive = [override for override in overrides if override.key_or_group.partition(".")[0] not in NEUTRAL]
    ours = sorted(str(override.input_line) for override in decisive)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():  # another's link could lead the study out of this directory
        raise FewShotError(f"{path} is a link; replace it with the file")
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(study_name="search", storage=storage, direction="maximize", load_if_exists=True)
        theirs = study.user_attrs.get("overrides", ours)
        different = sorted({*map(str, theirs)} ^ {*ours})
    except Exception as error:  # the type depends on how the file is broken
        raise FewShotError(
            f"{path} is broken ({reason(error)}); delete it: the search then repeats its path over the complete jobs"
        ) from error
    if different:
        raise FewShotError(
            f"{path.parent} contains a search with different settings: {', '.join(different)} in one of the two; "
            "choose another directory with hydra.sweep.dir=PATH"
        )
    study.set_user_attr("overrides", ours)
    return study


def _distribution(override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: PLC0415

    value = override.value()
    try:
        if not isinstance(value, IntervalSweep):
            return CategoricalDistribution(list(override.sweep_string_iterator()))
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log)
        assert value.start is not None
        assert value.end is not None
        return FloatDistribution(value.start, value.end, log)
    except ValueError as error:
        raise FewShotError(f"{override.input_line}: {reason(error)}") from error


def _settings(job: "FrozenTrial") -> dict[str, Any]:
    """Return what a job is run with: four digits are enough, and can be read."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in job.params.items()}


def _value(returned: JobReturn) -> float | None:
    value = returned.return_value  # raises what the job raised
    return None if value is None else float(value)
