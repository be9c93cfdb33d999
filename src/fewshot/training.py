"""The training story: data, method, trainer; fit, choose on validation classes, test once, write down the result."""

import logging
import shlex
import subprocess
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from fewshot.callbacks import FiniteGradients, Interruption, ProgressBar, Record
from fewshot.checkpoints import AtomicCheckpoints, shapes, without_initial_weights
from fewshot.config import CHECKOUT, ROOT, as_overrides, check, command, compose, resolve, trains_on, with_classes
from fewshot.dashboard import Dashboard, log_result
from fewshot.data.bank import SPLITS, ImageBank
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.errors import FewShotError
from fewshot.hardware import check_hardware, keep_freed_memory, machine, precision_of, report_out_of_memory
from fewshot.initial import read_encoder
from fewshot.loggers import open_loggers, parts
from fewshot.methods.base import FewShotMethod
from fewshot.processes import stop_together
from fewshot.runs import (
    best_checkpoint,
    cannot_resume,
    check_best,
    check_same_data,
    chosen_on_resume,
    complete_results,
    last_checkpoint,
    load_for_resume,
    lock_run,
    new_run_dir,
    overrides,
    results_file,
    trained_on,
    write_json,
)
from fewshot.text import make_table, say
from fewshot.trust import CHOSEN_ON_RESUME, default_directories

MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # in the state of PyTorch's optimizers
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy", "pillow")


def compose_and_train(*overrides: str, **settings: Any) -> Path:
    """Train from a program: ``fewshot.train(method="maml", way=5, train={"episodes": 1000})``.

    Args:
        overrides: as on the command line: "method.order=1".
        settings: the same as keywords; a mapping holds the keys of a node or a group.

    Returns:
        The directory of the run.

    Raises:
        FewShotError: a mistake in the configuration or the data.
    """
    config = compose(*overrides, *as_overrides(settings))
    train(config)
    return Path(config.run_dir)


def train(config: DictConfig) -> float:
    """Train, validate and test as ``config`` says; everything written goes to ``config.run_dir``.

    Args:
        config: the composed ``conf/train.yaml``. Without a ``run_dir``, a new directory below ``outputs`` becomes it.

    Returns:
        The validation accuracy of the chosen weights, a fraction.

    Raises:
        FewShotError: a mistake in the configuration or the data.
    """
    if config.run_dir is None:
        config.run_dir = str(new_run_dir(f"{config.choices.method}_{config.choices.dataset}"))
    resolve(config)
    run_dir = Path(config.run_dir)
    place = "" if config.data_dir == default_directories()["data_dir"] else f" data_dir={config.data_dir}"
    interruption = Interruption(f"{command('train')} resume={run_dir}{place}{_own_choices(config)}")
    with interruption, lock_run(run_dir):
        config, checkpoint = load_for_resume(config)
        check(config)
        check_hardware(config.hardware)
        config.hardware.precision = precision_of(config.hardware)  # what a checkpoint says, and a resumed run keeps
        with report_out_of_memory(_less_memory(config)):
            data = make_data(config)
            config = with_classes(config, len(data.bank.classes("train")))
            if checkpoint is not None:
                anew = "train anew into another directory with hydra.run.dir=PATH"
                check_same_data(trained_on(checkpoint, run_dir), data.bank, run_dir, anew)
                results = complete_results(config)
                if results is not None:
                    _show_results(results, run_dir)
                    return float(results["val_accuracy"])
                check_best(run_dir, checkpoint)
            return _train(config, checkpoint, data, interruption)


def _less_memory(config: DictConfig) -> str:
    """What to lower where memory does not suffice."""
    if trains_on(config) == "classes":
        return f"lower train.batch_size in a new run, or choose another precision by resume={config.run_dir}"
    step = "method.vmap_tasks, or set method.recompute=true," if "vmap_tasks" in config.method else "train.meta_batch"
    return (
        f"lower {step} or train.way, train.shot and train.query, in a new run; or go on with this one by "
        f"resume={config.run_dir} and a higher hardware.accumulate_grad_batches or hardware.precision=bf16-mixed"
    )


def _train(
    config: DictConfig, checkpoint: dict[str, Any] | None, data: EpisodeDataModule, interruption: Interruption
) -> float:
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
) -> float:
    keep_freed_memory()
    run_dir = Path(config.run_dir)
    # On resume the weights of the checkpoint count, and what they once began with is not read again.
    init = read_encoder(config, data.bank) if checkpoint is None and config.encoder.get("init") else None
    method = make_method(config, initial_weights=checkpoint is None and init is None)
    if init is not None:
        init.copy_to(method.encoder)
    record = Record(None if init is None else init.record)
    finite = FiniteGradients(config.train.on_nan)
    keep: dict[str, Any] = {"dirpath": run_dir / "checkpoints", "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/accuracy", mode="max", save_on_train_epoch_end=False, **keep)
    last = ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **keep)
    own = [instantiate(node) for _, node in parts("callbacks", config.get("callbacks"))]
    trainer = make_trainer(config, record, finite, interruption, dashboard, *own, best, last, loggers=loggers)
    _check_hardware(config, method, trainer)
    data.trainer = trainer
    data.prepare_data()
    data.setup()
    if data.meta_batch > config.train.meta_batch:
        pieces = f" in each of {data.pieces} pieces" if data.pieces > 1 else ""
        _say(
            f"a training step takes {data.meta_batch} episodes, and not train.meta_batch={config.train.meta_batch}: "
            f"one for each of {data.processes} processes{pieces}"
        )
    _list_classes(data.bank, run_dir)
    if checkpoint is not None:
        data.load_state_dict(checkpoint[type(data).__qualname__])
    if data.trained > data.train_episodes:
        raise FewShotError(
            f"train.episodes={data.train_episodes} is less than the {data.trained} that the run in {run_dir} has "
            "trained on already; ask for at least as many"
        )
    from_here = last_checkpoint(run_dir) if checkpoint is not None else None
    with stop_together(trainer, interruption.resume):
        try:
            if checkpoint is not None:
                _check_state(checkpoint, method)
            # Of a training that is complete already, this restores the state and no more.
            trainer.fit(method, data, ckpt_path=from_here, weights_only=True)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if from_here is None or record.began:
                raise
            raise cannot_resume(from_here, error) from error
        interruption.check(trainer)
        # The test restores the older state that the callbacks had at the best weights.
        seconds, validations, skipped = record.seconds, record.validations, finite.skipped
        precisions, encoder_init = record.precisions, record.encoder_init
        trainer.test(method, data, ckpt_path=best_checkpoint(run_dir), weights_only=True, verbose=False)

    validation = max(estimate["accuracy"] for estimate in validations)
    results = outcome(config, method, data.bank, trainer) | {
        "val_accuracy": validation,
        "meta_batch": data.meta_batch,
        "train_seconds": seconds,
        "train_episodes_per_second": data.trained / seconds,
        "skipped_steps": skipped,
        "precisions": precisions,
        "encoder_init": encoder_init,
        "overrides": overrides(run_dir),
        "validations": validations,
    }
    log_result(trainer.loggers, results, trainer.global_step)
    _report(results, run_dir)
    return validation


def outcome(config: DictConfig, method: FewShotMethod, bank: ImageBank, trainer: pl.Trainer) -> dict[str, Any]:
    """What the results of every test hold: the task, the accuracy, and all that decided it.

    Args:
        config: of the run, with the task that was tested.
        method: after the test.
        bank: the images it was tested on.
        trainer: that tested it.
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
        "machine": machine(trainer.strategy.root_device, trainer.world_size),
        "versions": versions(),
        "commit": commit(),
        "config": OmegaConf.to_container(_without(config, "overrides")),
    }


def make_data(config: DictConfig, kind: Callable[..., EpisodeDataModule] = EpisodeDataModule) -> EpisodeDataModule:
    """The data module, of a given kind, its images not read yet."""
    keys = ("way", "shot", "query", "train", "val", "test", "seed", "eval_seed", "checkpoint_every", "cache_dir")
    transform = instantiate(config.get("transform"))  # a checkpoint of an earlier version has none
    settings = {key: config[key] for key in keys}
    return kind(config.dataset, transform=transform, trains_on=trains_on(config), **settings)


def make_method(config: DictConfig, initial_weights: bool = True) -> FewShotMethod:
    """The method; its checkpoints will hold the configuration.

    Args:
        config: the composed ``conf/train.yaml``.
        initial_weights: give it its first weights, which the seed decides, pretrained ones where they are asked for;
            False: a checkpoint will bring its own.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    make: Any = OmegaConf.to_container(config.method)
    method: FewShotMethod = instantiate(make if initial_weights else without_initial_weights(make))
    method.make_optimizer = instantiate(config.optimizer)
    method.make_schedule = instantiate(config.schedule)
    method.save_hyperparameters(OmegaConf.to_container(_without(config, "overrides", *CHOSEN_ON_RESUME)), logger=False)
    if config.hardware.compile and not method.compilable:
        _say(
            f"warning: hardware.compile=true: method={config.choices.method} differentiates its gradients, which "
            "torch.compile cannot; it runs as it is"
        )
    elif config.hardware.compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is, after a warning
        method.encoder.compile()
    return method


def _without(config: DictConfig, *keys: str) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key not in keys])


def make_trainer(config: DictConfig, *callbacks: pl.Callback, loggers: Sequence[Logger] = ()) -> pl.Trainer:
    """Lightning's trainer, as the configuration says.

    Args:
        config: the composed ``conf/train.yaml``.
        callbacks: beside those that every run has.
        loggers: where it logs.
    """
    # Lightning advises worker processes for every loader without them; ours gathers from memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message='install "ipywidgets"')  # a notebook without it shows no progress bar
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty")  # a resumed run's
    warnings.filterwarnings("ignore", message=".*Total length of .* is zero")  # of one that is complete
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting")  # they are equal
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")  # an error of ours says it
    warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)` before")  # a loss scaler passes over steps
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # advertisements among them
    logging.getLogger("lightning_fabric.utilities").setLevel(logging.WARNING)
    hardware = {str(key): value for key, value in config.hardware.items() if key != "compile"}
    hardware["precision"] = precision_of(config.hardware)
    return pl.Trainer(
        **hardware,
        max_epochs=-1,  # one from each checkpoint to the next; Record sees the last training episode
        use_distributed_sampler=False,  # ours knows its rank
        callbacks=[*callbacks, ProgressBar(refresh_rate=10)],
        plugins=[AtomicCheckpoints()],
        logger=list(loggers),
        log_every_n_steps=config.log_every,
        default_root_dir=config.run_dir,
        enable_model_summary=False,
        num_sanity_val_steps=0,  # it would embed every validation image for two episodes
        inference_mode=False,  # some methods take gradients to solve an episode
    )


def _check_hardware(config: DictConfig, method: FewShotMethod, trainer: pl.Trainer) -> None:
    """Refuse what only the trainer knows not to go together.

    Raises:
        FewShotError: names what does not.
    """
    scaled = str(config.hardware.precision) in {"16", "16-mixed"}
    if scaled and trainer.precision != "16-mixed":
        raise FewShotError("hardware.precision=16-mixed needs a GPU; choose hardware.precision=auto")
    if trainer.accumulate_grad_batches > 1 and not method.automatic_optimization:
        raise FewShotError(
            f"hardware.accumulate_grad_batches={trainer.accumulate_grad_batches} must be 1: method="
            f"{config.choices.method} takes the gradient of one task after another as it is, however many "
            "train.meta_batch has"
        )
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    started = trainer.world_size > 1 and not trainer.strategy.cluster_environment.creates_processes_externally  # type: ignore[attr-defined]
    if sweep and started:
        raise FewShotError(
            f"hardware.devices={config.hardware.devices}: the jobs of a sweep (-m) have one process each; choose "
            "hardware.devices=1, or start the runs one by one"
        )


def _check_state(checkpoint: dict[str, Any], method: FewShotMethod) -> None:
    """Refuse a state that Lightning would leave out in silence, or PyTorch stumble over at the first step.

    Raises:
        ValueError: tells what does not fit the method.
    """
    if not all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values()):
        raise ValueError("its weights are not finite")
    if shapes(checkpoint["state_dict"]) != shapes(method.state_dict()):
        raise ValueError("its weights are not those of the method")
    parameters = list(method.parameters())
    (optimizer,) = checkpoint["optimizer_states"]
    for number, state in optimizer["state"].items():
        for name in MOMENTS & state.keys():
            if state[name] is not None and state[name].shape != parameters[number].shape:
                raise ValueError(f"the optimizer's {name} of parameter {number} is not of its shape")
    if len(checkpoint["lr_schedulers"]) != (method.make_schedule is not None):
        raise ValueError("the schedule of the learning rate is another one")


def _own_choices(config: DictConfig) -> str:
    """The overrides that a resumed run takes from its command line, as the end of one."""
    return "".join(f" {shlex.quote(override)}" for override in chosen_on_resume(config.overrides))


@rank_zero_only
def _list_classes(bank: ImageBank, run_dir: Path) -> None:
    """Write down which classes each split holds, since seeds and data decide it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "classes.json", {split: bank.class_names(split) for split in SPLITS})


@rank_zero_only
def _report(results: dict[str, Any], run_dir: Path) -> None:
    """Write ``results.json``, and print the table."""
    write_json(results_file(run_dir), results)
    _show_results(results, run_dir)


@rank_zero_only
def _say(line: str) -> None:
    say(line)


@rank_zero_only
def _show_results(results: dict[str, Any], run_dir: Path) -> None:
    title = f"{results['way']}-way {results['shot']}-shot accuracy on test classes, with its 95% interval"
    shown = {key: results[key] for key in ("dataset", "method", "distance", "encoder") if results[key]} | {
        "accuracy": f"{results['accuracy']:.2%} ± {results['ci95']:.2%}",
        "episodes": f"{results['episodes']:,}",
    }
    say(
        make_table(title, shown, [list(shown.values())], numbers=("accuracy", "episodes")),
        f"Trained in {results['train_seconds']:.0f} s. Results, checkpoints, log: {run_dir}",
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {"python": python_version(), **{package: version(package) for package in PACKAGES}}


def commit() -> str | None:
    """The commit of this code, marked when files differ from it; None outside a git checkout."""
    if not CHECKOUT:
        return None
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
