"""A training run: fit, choose the weights on validation classes, test them once, write the results."""

import logging
import math
import shlex
import subprocess
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from fewshot.callbacks import FiniteGradients, Interruption, Record
from fewshot.checkpoints import AtomicCheckpoints, shapes
from fewshot.config import (
    CHECKOUT,
    ROOT,
    as_overrides,
    check,
    command,
    compose,
    resolve,
    trains_on,
    with_classes,
    without_initial_weights,
)
from fewshot.dashboard import Dashboard, log_result
from fewshot.data.bank import SPLITS, ImageBank
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.directories import best_checkpoint, has_run, last_checkpoint, lock_run, new_run_dir, results_file
from fewshot.errors import FewShotError, reason
from fewshot.files import write_atomically
from fewshot.hardware import check_hardware, keep_freed_memory, machine, precision_of, report_out_of_memory
from fewshot.initial import read_encoder
from fewshot.loggers import open_loggers, parts
from fewshot.methods.base import FewShotMethod, set_mirror
from fewshot.processes import stop_together
from fewshot.progress import ProgressBar, show_results, show_settings
from fewshot.results import write_episodes
from fewshot.runs import (
    cannot_resume,
    check_best,
    check_same_data,
    check_tested,
    chosen_on_resume,
    complete_results,
    horizon,
    load_for_resume,
    overrides,
    trained_on,
    write_json,
)
from fewshot.text import say
from fewshot.trained import warn_of_other_images, warn_of_unused_distance
from fewshot.trust import CHOSEN_ON_RESUME, default_directories

MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # state of PyTorch's optimizers
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy", "pillow")


def compose_and_train(*overrides: str, **settings: Any) -> Path:
    """Train from a program: ``fewshot.train(method="maml", way=5, train={"episodes": 1000})``.

    Args:
        overrides: as on the command line: "method.order=1".
        settings: the same as keyword arguments; a mapping holds the keys of a node or a group.

    Returns:
        The directory of the run.

    Raises:
        FewShotError: a mistake in the configuration or the data.
    """
    config = compose(*overrides, *as_overrides(settings))
    if config.run_dir is None:
        config.run_dir = str(_new_run_dir(config))
    rank_zero_only(say)(f"run directory: {config.run_dir}")
    train(config)
    return Path(config.run_dir)


def train(config: DictConfig) -> float | None:
    """Train, validate and test as configured; all output goes to ``config.run_dir``.

    Args:
        config: the composed ``conf/train.yaml``. A null ``run_dir`` is set to a new directory below ``outputs``.

    Returns:
        The validation accuracy of the chosen weights, a fraction; None without validation (``train.also_on=val``).

    Raises:
        FewShotError: a mistake in the configuration or the data.
    """
    if config.run_dir is None:
        config.run_dir = str(_new_run_dir(config))
    resolve(config)
    run_dir = Path(config.run_dir)
    data_dir = "" if config.data_dir == default_directories()["data_dir"] else f" data_dir={config.data_dir}"
    interruption = Interruption(f"{command('train')} resume={run_dir}{data_dir}{_choices_on_resume(config)}")
    # Nothing is created in a directory that was named by mistake.
    locked = config.resume in (None, "auto") or has_run(run_dir)
    with interruption, lock_run(run_dir) if locked else nullcontext():
        config, checkpoint = load_for_resume(config)
        check(config)
        check_hardware(config.hardware)
        if trains_on(config) == "nothing":
            method = config.choices.method
            raise FewShotError(
                f"method={method} has nothing to train: use it on the encoder of a run with "
                f"{command('evaluate')} checkpoint=RUN_DIR method={method}, or on a pretrained one with "
                "encoder=pretrained"
            )
        _check_search(config)
        config.hardware.precision = precision_of(config.hardware)  # saved in checkpoints and kept on resume
        with report_out_of_memory(_memory_advice(config)):
            data = make_data(config)
            config = with_classes(config, len(data.bank.classes("train")))
            if checkpoint is not None:
                fix = "train again in another directory with hydra.run.dir=PATH"
                check_same_data(trained_on(checkpoint, run_dir), data.bank, run_dir, fix)
                results = complete_results(config)
                if results is not None:
                    show_results(results, run_dir)
                    return None if results["val_accuracy"] is None else float(results["val_accuracy"])
                check_best(run_dir, checkpoint)
            return _train(config, checkpoint, data, interruption)


def _new_run_dir(config: DictConfig) -> Path:
    return new_run_dir(f"{config.choices.method}_{config.choices.dataset}")


def _memory_advice(config: DictConfig) -> str:
    """Return what to lower if the memory does not suffice."""
    if trains_on(config) == "classes":
        return f"lower train.batch_size in a new run, or choose another precision with resume={config.run_dir}"
    by_task = "vmap_tasks" in config.method  # such a method accumulates by itself
    step = "train.meta_batch or " if config.train.meta_batch > 1 else ""
    step = "method.vmap_tasks, or set method.recompute=true, or " if by_task else step
    devices = config.hardware.devices
    processes = devices * config.hardware.get("num_nodes", 1) if isinstance(devices, int) else 1
    pieces = not by_task and config.train.meta_batch > processes  # a piece has an episode at least
    accumulate = "a higher hardware.accumulate_grad_batches or " if pieces else ""
    return (
        f"lower {step}train.way, train.shot and train.query, in a new run; or resume this one with "
        f"resume={config.run_dir} and {accumulate}hardware.precision=bf16-mixed"
    )


def _train(
    config: DictConfig, checkpoint: dict[str, Any] | None, data: EpisodeDataModule, interruption: Interruption
) -> float | None:
    step = checkpoint["global_step"] if checkpoint is not None else 0
    dashboard = Dashboard(config.get("pictures", True))
    dashboard.load_run_ids(checkpoint)
    with open_loggers(config, step, dashboard.run_ids) as loggers:
        return _train_and_log(config, checkpoint, data, interruption, dashboard, loggers)


def _train_and_log(
    config: DictConfig,
    checkpoint: dict[str, Any] | None,
    data: EpisodeDataModule,
    interruption: Interruption,
    dashboard: Dashboard,
    loggers: Sequence[Logger],
) -> float | None:
    keep_freed_memory()
    run_dir = Path(config.run_dir)
    # On resume the weights come from the checkpoint, so the initial ones are not read again.
    init = read_encoder(config, data.bank) if checkpoint is None and config.encoder.get("init") is not None else None
    method = make_method(config, initial_weights=checkpoint is None and init is None)
    if init is not None:
        init.copy_to(method.encoder)
    record = Record() if init is None else Record(init.record, init.trained_before)
    finite = FiniteGradients(config.train.on_nan)
    keep: dict[str, Any] = {"dirpath": run_dir / "checkpoints", "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/accuracy", mode="max", save_on_train_epoch_end=False, **keep)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **keep)
    configured = [instantiate(node) for _, node in parts("callbacks", config.get("callbacks"))]
    trainer = make_trainer(config, record, finite, interruption, dashboard, *configured, best, last, loggers=loggers)
    _check_hardware(config, method, trainer)
    data.trainer = trainer
    data.prepare_data()
    data.setup()
    _check_steps(config, data)
    _list_classes(data.bank, run_dir)
    if checkpoint is not None:
        data.load_state_dict(checkpoint[type(data).__qualname__])
    if data.trained > data.train_episodes:
        raise FewShotError(
            f"train.episodes={data.train_episodes} is less than the {data.trained} that the run in {run_dir} has "
            "trained on already; request at least as many"
        )
    show_settings(config, data.bank, method, trainer)
    rank_zero_only(warn_of_other_images)(config.method, f"encoder={config.choices.encoder}", "test")
    resume_from = last_checkpoint(run_dir) if checkpoint is not None else None
    with stop_together(trainer, interruption.resume):
        try:
            if checkpoint is not None:
                _check_state(checkpoint, method)
            interruption.wait_for_machines(trainer)
            # If the training is already complete, this only restores the state.
            trainer.fit(method, data, ckpt_path=resume_from, weights_only=True)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if resume_from is None or record.began:
                raise
            raise cannot_resume(resume_from, error) from error
        interruption.check(trainer)
        if not data.has_validation:
            _keep_final_weights(run_dir)
            trainer.strategy.barrier()
        else:
            check_tested(run_dir, record.validations)
        # Loading the best checkpoint for the test resets the callbacks to their state at that time.
        seconds, validations, skipped = record.seconds, record.validations, finite.skipped
        precisions, encoder_init, trained = record.precisions, record.encoder_init, data.trained
        trainer.test(method, data, ckpt_path=best_checkpoint(run_dir), weights_only=True, verbose=False)
        correct = dashboard.correct(trainer)

    validation = max((estimate["accuracy"] for estimate in validations), default=None)
    results = outcome(config, method, data.bank, trainer) | {
        "val_accuracy": validation,
        "meta_batch": data.meta_batch,
        # Batch norm and losses over pairs of images see only a part of a batch.
        "batch_parts": data.processes * data.pieces if method.trains_on == "classes" else None,
        "train_seconds": seconds,
        "train_episodes_per_second": trained / seconds,
        "skipped_steps": skipped,
        "precisions": precisions,
        "encoder_init": encoder_init,
        "overrides": overrides(run_dir),
        "validations": validations,
    }
    log_result(trainer.loggers, results, trainer.global_step)
    _report(results, correct, run_dir)
    return validation


def _check_steps(config: DictConfig, data: EpisodeDataModule) -> None:
    """Say if a step takes more episodes than configured; refuse it if the schedule counts on the configured steps."""
    if data.meta_batch <= config.train.meta_batch:
        return
    if key := horizon(config):
        raise FewShotError(
            f"{key}={config.train.steps} counts steps of {config.train.meta_batch} episodes, but a step takes "
            f"{data.meta_batch}, so the training would end before the schedule does; set "
            f"train.meta_batch={data.meta_batch}, or lower hardware.devices or hardware.accumulate_grad_batches"
        )
    pieces = f" in each of {data.pieces} pieces" if data.pieces > 1 else ""
    rank_zero_only(say)(
        f"a training step takes {data.meta_batch} episodes, not train.meta_batch={config.train.meta_batch}: "
        f"one for each of {data.processes} processes{pieces}"
    )


def outcome(config: DictConfig, method: FewShotMethod, bank: ImageBank, trainer: pl.Trainer) -> dict[str, Any]:
    """Return the result fields that every test has: the task, the accuracy, and everything that affects it.

    Args:
        config: the configuration of the run, with the tested task.
        method: the method, after the test.
        bank: the images it was tested on.
        trainer: the trainer that tested it.
    """
    return {
        **config.choices,
        "distance": config.choices.distance if "distance" in config.method else None,  # MAML has none
        **{key: config[key] for key in ("way", "shot", "query")},
        **method.estimates["test"]._asdict(),
        "seed": config.seed,
        "data": bank.record(),
        "encoder_parameters": sum(parameter.numel() for parameter in method.encoder.parameters()),
        "precision": str(trainer.precision),
        "transductive": method.transductive,
        "assumes_balance": method.assumes_balance,
        "machine": machine(trainer.strategy.root_device, trainer.world_size),
        "versions": versions(),
        "commit": commit(),
        "config": OmegaConf.to_container(_without(config, "overrides")),
    }


def make_data(config: DictConfig, kind: Callable[..., EpisodeDataModule] = EpisodeDataModule) -> EpisodeDataModule:
    """Make the data module, of class ``kind``; its images are not read yet."""
    keys = ("way", "shot", "query", "train", "val", "test", "seed", "eval_seed", "checkpoint_every", "cache_dir")
    transform = instantiate(config.get("transform"))  # a checkpoint of an earlier version has none
    settings = {key: config[key] for key in keys}
    return kind(config.dataset, transform=transform, trains_on=trains_on(config), **settings)


def make_method(config: DictConfig, initial_weights: bool = True) -> FewShotMethod:
    """Make the method; its checkpoints will contain the configuration.

    Args:
        config: the composed ``conf/train.yaml``.
        initial_weights: initialize the weights from the seed, or with pretrained ones if configured; False: a
            checkpoint will replace them.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    make: Any = OmegaConf.to_container(config.method)
    method: FewShotMethod = instantiate(make if initial_weights else without_initial_weights(make))
    method.make_optimizer = instantiate(config.optimizer)
    method.make_schedule = instantiate(config.schedule)
    set_mirror(method, config.get("mirror"))
    method.save_hyperparameters(OmegaConf.to_container(_without(config, "overrides", *CHOSEN_ON_RESUME)), logger=False)
    rank_zero_only(warn_of_unused_distance)(config.get("overrides") or [], config)
    if config.hardware.compile and not method.compilable:
        rank_zero_only(say)(
            f"warning: hardware.compile=true: method={config.choices.method} differentiates its gradients, which "
            "torch.compile cannot; it runs uncompiled",
            error=True,
        )
    elif config.hardware.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs uncompiled, after a warning
        method.encoder.compile()
    return method


def _without(config: DictConfig, *keys: str) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key not in keys])


def make_trainer(config: DictConfig, *callbacks: pl.Callback, loggers: Sequence[Logger] = ()) -> pl.Trainer:
    """Make Lightning's trainer from the configuration.

    Args:
        config: the composed ``conf/train.yaml``.
        callbacks: in addition to those that every run has.
        loggers: where the run logs.

    Raises:
        FewShotError: Lightning has no such device or strategy.
    """
    # Lightning advises worker processes for every loader without them; ours gathers from memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message='install "ipywidgets"')  # a notebook without it shows no progress bar
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty")  # when resuming
    warnings.filterwarnings("ignore", message=".*Total length of .* is zero")  # of a complete run
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting")  # they are equal
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")  # we raise our own error
    warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)` before")  # a loss scaler skips steps
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hides advertisements
    logging.getLogger("lightning_fabric.utilities").setLevel(logging.WARNING)
    hardware = {str(key): value for key, value in config.hardware.items() if key != "compile"}
    hardware["precision"] = precision_of(config.hardware)
    try:
        return pl.Trainer(
            **hardware,
            max_epochs=-1,  # an epoch ends at each checkpoint; Record sees the last training episode
            use_distributed_sampler=False,  # ours knows its rank
            callbacks=[*callbacks, ProgressBar()],
            plugins=[AtomicCheckpoints()],
            logger=list(loggers),
            log_every_n_steps=config.log_every,
            default_root_dir=config.run_dir,
            enable_model_summary=False,
            num_sanity_val_steps=0,  # it would embed every validation image for two episodes
            inference_mode=False,  # some methods take gradients to solve an episode
        )
    except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
        chosen = " ".join(f"hardware.{key}={config.hardware[key]}" for key in ("accelerator", "devices", "strategy"))
        raise FewShotError(f"Lightning has no trainer with {chosen}: {reason(error)}") from error


def check_precision(config: DictConfig, trainer: pl.Trainer) -> None:
    """Reject a precision that Lightning replaced by another one.

    Raises:
        FewShotError: 16-mixed without a GPU.
    """
    if str(config.hardware.precision) in {"16", "16-mixed"} and trainer.precision != "16-mixed":
        raise FewShotError("hardware.precision=16-mixed needs a GPU; choose hardware.precision=auto")


def _check_hardware(config: DictConfig, method: FewShotMethod, trainer: pl.Trainer) -> None:
    """Reject combinations of hardware settings that only the trainer knows to be incompatible.

    Raises:
        FewShotError: names the incompatible settings.
    """
    check_precision(config, trainer)
    if trainer.accumulate_grad_batches > 1 and not method.automatic_optimization:
        raise FewShotError(
            f"hardware.accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1: method="
            f"{config.choices.method} already takes the gradient of one task at a time, whatever "
            "train.meta_batch is"
        )
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    started = trainer.world_size > 1 and not trainer.strategy.cluster_environment.creates_processes_externally  # type: ignore[attr-defined]
    if sweep and started:
        raise FewShotError(
            f"hardware.devices={config.hardware.devices}: the jobs of a sweep (-m) have one process each; choose "
            "hardware.devices=1, or start the runs one at a time"
        )


def _check_search(config: DictConfig) -> None:
    """Reject a search (``hydra/sweeper=search``) for the best validation accuracy without validation.

    Raises:
        FewShotError: names the key.
    """
    search = HydraConfig.initialized() and HydraConfig.get().sweeper.get("n_trials") is not None
    if search and config.train.also_on is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise FewShotError(
            f"train.also_on={config.train.also_on} leaves no validation accuracy to search by; search first, and train "
            "on the validation classes with the settings that were found"
        )


def _check_state(checkpoint: dict[str, Any], method: FewShotMethod) -> None:
    """Reject a state that Lightning would silently ignore, or that would make PyTorch fail at the first step.

    Raises:
        ValueError: names what does not fit the method.
    """
    if not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
        raise ValueError("its weights are not finite")
    if shapes(checkpoint["state_dict"]) != shapes(method.state_dict()):
        raise ValueError("its weights do not fit the method")
    parameters = list(method.parameters())
    (optimizer,) = checkpoint["optimizer_states"]
    for number, state in optimizer["state"].items():
        for name in MOMENTS & state.keys():
            if state[name] is None:
                continue
            if state[name].shape != parameters[number].shape:
                raise ValueError(f"the optimizer's {name} of parameter {number} has a different shape")
            if not state[name].isfinite().all():
                raise ValueError(f"the optimizer's {name} of parameter {number} is not finite")
    if len(checkpoint["lr_schedulers"]) != (method.make_schedule is not None):
        raise ValueError("the learning-rate schedule is different")
    fresh = method.configure_optimizers()
    if not _alike(optimizer["param_groups"], fresh["optimizer"].state_dict()["param_groups"]):
        raise ValueError("the optimizer's settings are different")
    for state in checkpoint["lr_schedulers"]:
        schedule = fresh["lr_scheduler"]["scheduler"]
        if not _alike(state, schedule.state_dict()) or any(
            callable(getattr(type(schedule), str(key), None)) for key in state
        ):
            raise ValueError("the learning-rate schedule is different")
    trained = checkpoint["EpisodeDataModule"]["trained"]
    if type(trained) is not int or trained < 0:
        raise ValueError(f"its number of training episodes is {trained}")


def _alike(saved: Any, fresh: Any) -> bool:
    """Whether a saved state has the kinds of values of a fresh one; PyTorch would take anything, and fail at a step."""
    if saved is None or fresh is None:
        return True
    if isinstance(fresh, dict):
        return isinstance(saved, dict) and all(_alike(saved[key], fresh[key]) for key in saved.keys() & fresh.keys())
    if isinstance(fresh, list | tuple):
        return isinstance(saved, list | tuple) and len(saved) == len(fresh) and all(map(_alike, saved, fresh))
    if isinstance(fresh, int | float):
        return isinstance(saved, int | float) and (math.isfinite(saved) or not math.isfinite(fresh))
    return type(saved) is type(fresh)


def _choices_on_resume(config: DictConfig) -> str:
    """Return the overrides that a resumed run takes from its command line, as text to append to a command."""
    return "".join(f" {shlex.quote(override)}" for override in chosen_on_resume(config.overrides))


@rank_zero_only
def _keep_final_weights(run_dir: Path) -> None:
    """Without validation no weights are the best: the final ones take their place."""
    write_atomically(best_checkpoint(run_dir), last_checkpoint(run_dir).read_bytes())


@rank_zero_only
def _list_classes(bank: ImageBank, run_dir: Path) -> None:
    """Write the classes of each split to ``classes.json``, since they depend on seeds and data."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "classes.json", {split: bank.class_names(split) for split in SPLITS})


@rank_zero_only
def _report(results: dict[str, Any], correct: NDArray[np.float64], run_dir: Path) -> None:
    """Write ``results.json`` and what it summarises, and print the table."""
    write_episodes(results_file(run_dir), correct)
    write_json(results_file(run_dir), results)
    show_results(results, run_dir)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": python_version(), **{package: version(package) for package in PACKAGES}}


def commit() -> str | None:
    """Return the commit of this code, marked "-dirty" if files differ; None outside a git checkout."""
    if not CHECKOUT:
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
