"""Callbacks of a run: records for resuming, non-finite gradients, interruption."""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from fewshot.data.contents import contents_of
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import EpisodeNumber, MetaBatch
from fewshot.directories import last_checkpoint
from fewshot.errors import FewShotError, Interrupted
from fewshot.hardware import asynchronous
from fewshot.methods.base import FewShotMethod, require_finite
from fewshot.metrics import count_correct, largest
from fewshot.text import say
from fewshot.trust import plain


class Record(pl.Callback):
    """Schedules validations, and keeps the state that a resumed run needs.

    Attributes:
        seconds: time spent in training steps, without validations.
        validations: the estimate of each validation, with the ``trained_episodes`` before it.
        precisions: the precisions of the training in order, each as "PRECISION from EPISODE".
        encoder_init: the checkpoint of the encoder's initial weights and its digest; None if there was none.
        trained_before: what the encoder was trained on before, see ``fewshot.initial.InitialEncoder``.
        began: whether setup is complete and the checkpoint is restored.
    """

    def __init__(
        self, encoder_init: dict[str, str] | None = None, trained_before: Sequence[dict[str, str]] = ()
    ) -> None:
        self.encoder_init, self.trained_before = encoder_init, list(trained_before)
        self.seconds = 0.0
        self.validations: list[dict[str, float]] = []
        self.began = False
        self._since = 0.0
        self.precisions: list[str] = []
        self._contents: str | None = None
        self._random: list[torch.Tensor] | None = None
        self._warned = False

    def on_train_epoch_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self.began = True
        self._note_precision(str(trainer.precision), data_of(trainer).trained)
        if self._random is not None:  # now that setup is complete
            torch.set_rng_state(self._random[0])
            if self._random[1:] and torch.cuda.is_available():
                torch.cuda.set_rng_state(self._random[1])
            self._random = None
        # Every epoch of Lightning ends with a checkpoint, but not every one with a validation.
        trainer.check_val_every_n_epoch = 1 if data_of(trainer).validates else sys.maxsize
        self._since = time.monotonic()

    def on_train_batch_end(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        if trainer.is_last_batch and method.device.type == "cuda":
            torch.cuda.synchronize(method.device)  # include steps that are still running
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def on_train_epoch_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        for logger in trainer.loggers:
            logger.save()  # the log is on the disk before the checkpoint, so a resumed run leaves no gap

    def on_validation_end(self, trainer: pl.Trainer, method: FewShotMethod) -> None:  # type: ignore[override]  # noqa: D102
        trained, estimate = data_of(trainer).trained, method.estimates["val"]
        self.validations.append({"trained_episodes": trained, **estimate._asdict()})
        accuracy = f"{estimate.accuracy:.2%} ± {estimate.ci95:.2%}"
        method.print(f"episode {trained:,}: validation accuracy {accuracy}", flush=True)
        chance = 1 / data_of(trainer).episode["way"]
        if estimate.accuracy - estimate.ci95 <= chance and not self._warned:
            self._warned = True
            method.print(
                f"warning: after {trained:,} training episodes this is what guessing gives ({chance:.2%}); if it does "
                "not improve, check optimizer.lr, distance and dataset.normalise",
                flush=True,
            )
        self._since = time.monotonic()

    def on_save_checkpoint(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        if self._contents is None:
            self._contents = contents_of(data_of(trainer).bank).pack()
        checkpoint["data"] = self._contents
        checkpoint["trained_before"] = self.trained_before

    def _note_precision(self, precision: str, trained: int) -> None:
        before = self.precisions[-1].partition(" from ")[0] if self.precisions else None
        if precision == before:
            return
        self.precisions.append(f"{precision} from {trained}")
        if before is not None:
            rank_zero_only(say)(
                f"warning: the run was trained with hardware.precision={before} so far, and continues with "
                f"{precision}; its results will say so",
                error=True,
            )

    def on_load_checkpoint(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        self.trained_before = plain(checkpoint.get("trained_before", []))
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if state is not None:
                _move(state, callback)  # type: ignore[arg-type]
        # Lightning would resume within an epoch; ours starts a new epoch with the next episode.
        loops = checkpoint["loops"]["fit_loop"]
        for key in [key for key in loops if key.endswith("batch_progress")]:
            del loops[key]

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        names = ("seconds", "validations", "precisions", "encoder_init")
        state = {name: getattr(self, name) for name in names}
        random = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
        if not torch.distributed.is_initialized():
            return state | {"random": random}
        all_random = [random] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_random, random)  # rank 0 saves the states of all ranks
        return state | {"random": all_random[0], "random_elsewhere": all_random[1:]}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.seconds, self.validations = state["seconds"], state["validations"]
        self.precisions = list(state.get("precisions", []))
        self.encoder_init = plain(state.get("encoder_init"))
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        all_random = dict(enumerate([state["random"], *state.get("random_elsewhere", [])]))
        self._random = all_random.get(rank)  # None if the run had fewer processes


class Predictions(pl.Callback):
    """Collects the predictions of a method in a test; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._numbers: list[EpisodeNumber] = []
        self._largest: list[torch.Tensor] = []

    @property
    def predictions(self) -> dict[EpisodeNumber, NDArray[np.bool_]]:
        """The classes with the largest logit of each query, bool ``[queries, way]``, per episode of this process."""
        predictions = torch.cat(self._largest).cpu().numpy()
        return dict(zip(self._numbers, predictions, strict=True))

    def correct(self, trainer: pl.Trainer) -> NDArray[np.float64]:
        """Count the correct predictions in each test episode, over all processes; all of them must call this.

        Returns:
            float64 ``[episodes]``, with fractions for ties as in ``fewshot.metrics.credit``.
        """
        data, predictions = data_of(trainer), self.predictions
        correct = np.zeros(data.episodes["test"], dtype=np.float32)  # MPS has no float64
        correct[[number.number for number in predictions]] = count_correct(data.datasets["test"], predictions)
        device = trainer.strategy.root_device
        total = trainer.strategy.reduce(torch.from_numpy(correct).to(device), reduce_op="sum")
        return np.asarray(total.cpu().numpy(), dtype=np.float64)

    def on_test_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._numbers, self._largest = [], []

    def on_test_batch_end(  # noqa: D102
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        method: pl.LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: MetaBatch,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        self._numbers += batch.share.numbers
        self._largest.append(largest(outputs))


class TestTime(pl.Callback):
    """Measures how long a method takes to solve test episodes, without the time to draw them.

    Methods that compare embeddings embed the images before the first episode, which does not count; MAML's time
    includes its network's.

    On a CPU it is the processor time of all threads, which does not depend on what else the machine is doing; on an
    accelerator, the time that passes.

    Attributes:
        seconds: in total.
    """

    def __init__(self) -> None:
        self.seconds = self._since = 0.0

    def on_test_batch_start(self, trainer: pl.Trainer, method: pl.LightningModule, *_: Any) -> None:  # noqa: ARG002, D102
        self._since = _clock(method.device)

    def on_test_batch_end(self, trainer: pl.Trainer, method: pl.LightningModule, *_: Any) -> None:  # noqa: ARG002, D102
        self.seconds += _clock(method.device) - self._since


class FiniteGradients(pl.Callback):
    """Stops the run at a gradient that is not finite, or skips the step.

    Stopping costs an accelerator nothing: norms are checked when metrics are logged, and before weights are validated
    or saved. Skipping needs each norm at once, so the host waits for every step. While the loss scaler of 16-mixed
    searches for its scale, some gradients are infinite and it skips those steps; the run stops if no scale works.

    A run that skips more than a tenth of its steps fails, because it is not the requested training.

    Args:
        on_nan: "stop" or "skip".

    Attributes:
        skipped: how many steps were skipped.
    """

    MAX_SKIPPED = 0.1  # of a run's steps

    def __init__(self, on_nan: str = "stop") -> None:
        self.on_nan = on_nan
        self.skipped = 0
        self._norms: list[tuple[range, torch.Tensor]] = []

    def on_before_optimizer_step(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: FewShotMethod,  # type: ignore[override]
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
    ) -> None:
        data = data_of(trainer)
        episodes = data.step
        norm = torch.nn.utils.get_total_norm(
            parameter.grad for parameter in method.parameters() if parameter.grad is not None
        )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self.on_nan == "skip":
            if not norm.isfinite():
                method.zero_grad()  # the optimizer ignores parameters without a gradient
                self.skipped += 1
                method.print(f"skipped: {_not_finite(norm, episodes, data)}", flush=True)
                if scaler is None or scaler.get_scale() < 1:
                    self._limit(data, method)
        elif scaler is None:
            self._norms.append((episodes, norm))
            if not asynchronous(norm.device) or len(self._norms) >= _log_every(trainer):
                self._look(trainer)
        elif trainer.global_step % _log_every(trainer) == 0 and scaler.get_scale() < 1 and not norm.isfinite():
            # The scaler itself skips such a step and halves its scale, which starts at 65536. An overflow is resolved
            # long before the scale is 1.
            raise FewShotError(
                f"{_not_finite(norm, episodes, data)}, as others before it, however small the loss scale "
                "of 16-mixed. None of them has changed the weights. Choose hardware.precision=bf16-mixed, or lower "
                f"{_rates(method)}, in a new run"
            )

    def on_validation_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: D102
        self._look(trainer)
        # A checkpoint follows. Finite gradients may still lead to infinite weights.
        require_finite(method, f"the network after {data_of(trainer).trained:,} training episodes")

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.skipped = state["skipped"]

    def _limit(self, data: EpisodeDataModule, method: pl.LightningModule) -> None:
        """Raise an error once the run has skipped more than ``MAX_SKIPPED`` of all its steps."""
        steps = -(-data.train_episodes // data.meta_batch)
        if self.skipped > self.MAX_SKIPPED * steps:
            raise FewShotError(
                f"{self.skipped:,} of the run's {steps:,} training steps were skipped because their gradients were not "
                f"finite, and train.on_nan=skip allows {self.MAX_SKIPPED:.0%}; lower {_rates(method)} in a new "
                "run, or look for invalid images"
            )

    def _look(self, trainer: pl.Trainer) -> None:
        norms, self._norms = self._norms, []
        if not norms or torch.stack([norm for _, norm in norms]).isfinite().all():
            return
        episodes, norm = next((episodes, norm) for episodes, norm in norms if not norm.isfinite())
        kept = last_checkpoint(Path(trainer.default_root_dir)).exists()
        raise FewShotError(
            f"{_not_finite(norm, episodes, data_of(trainer))}."
            + (" The last checkpoint predates it." if kept else "")
            + f" Lower {_rates(trainer.lightning_module)} in a new run, or skip such steps with "
            + (f"resume={trainer.default_root_dir} " if kept else "")
            + "train.on_nan=skip"
        )


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.get_device_module(device).synchronize()
    return time.monotonic()


def _rates(method: pl.LightningModule) -> str:
    """Return what to lower, for advice: the learning rates, and other settings of the optimizer that are very high."""
    settings = method.trainer.optimizers[0].param_groups[0]
    high = [f"optimizer.{name}" for name in ("weight_decay", "momentum") if settings.get(name, 0) >= 1]
    inner = [f"method.{name}" for name in vars(method) if name.endswith("learning_rate")]
    return " or ".join([*high, "optimizer.lr", *inner])


def _not_finite(norm: torch.Tensor, episodes: range, data: EpisodeDataModule) -> str:
    epoch, first = divmod(episodes.start, data.every)
    numbers = f"{first}" if len(episodes) == 1 else f"{first} to {first + len(episodes) - 1}"
    return (
        f"the gradient of training episode {episodes.start} is {norm.item()} "
        f"(seed={data.train_episode['seed']}, epoch {epoch}, number {numbers})"
    )


class Interruption(pl.Callback):
    """Lets Ctrl-C, SIGTERM and Slurm's SIGUSR1 end a run; training ends after the current step, with a checkpoint.

    A context manager around the whole run. Outside of training, or at the second signal, the run ends at once.

    Args:
        resume: the command that resumes the run, for the message.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, resume: str) -> None:
        self.resume = resume
        self._received: int | None = None
        self._training = self._stop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only the main thread can handle signals
            self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for_machines(self, trainer: pl.Trainer) -> None:
        """Until all machines have joined, let signals end the process at once: PyTorch runs no handler while it waits.

        Nothing is lost, since nothing was trained.
        """
        if trainer.num_nodes > 1:
            rank_zero_only(say)(f"waiting for all processes on {trainer.num_nodes} machines")
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)

    def setup(self, trainer: pl.Trainer, method: pl.LightningModule, stage: str) -> None:  # noqa: ARG002, D102
        self._listen()  # all machines have joined

    def on_train_start(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._training = True
        self._listen()  # Lightning has installed handlers that end a training without a checkpoint

    def on_train_batch_end(  # noqa: D102
        self,
        trainer: pl.Trainer,
        method: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        if not _ends_a_step(trainer, batch_idx):
            return
        self._stop = self._received is not None
        if trainer.world_size > 1:  # all ranks must stop after the same step; they wait for each other to agree
            agree = batch_idx // trainer.accumulate_grad_batches % _log_every(trainer) == 0
            self._stop = agree and self._any(trainer)
        data = data_of(trainer)
        if self._stop and data.trained < data.stage.stop:
            trainer.should_stop, trainer.check_val_every_n_epoch = True, sys.maxsize

    def on_train_epoch_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        if self._stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:  # noqa: ARG002, D102
        self._training = False

    def check(self, trainer: pl.Trainer) -> None:
        """Raise ``Interrupted`` if any process received a signal during training."""
        if self._any(trainer):
            raise Interrupted(self._received or signal.SIGTERM, self.resume)

    def _any(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)

    def _listen(self) -> None:
        for number in self._before:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if not self._training or self._received is not None:
            raise Interrupted(number, self.resume)
        self._received = number
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            say("finishing the current step; interrupt again to stop immediately", error=True)


def _move(state: dict[str, Any], callback: ModelCheckpoint) -> None:
    """Make the state of a ``ModelCheckpoint`` name only the file that it keeps, in the current run directory.

    Lightning deletes the file that this state names once there is a better one, so it must not name any other file.
    """
    kept = str(Path(str(callback.dirpath), f"{callback.filename}.ckpt"))
    state["dirpath"] = callback.dirpath
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = kept if state[key] else ""
    state["best_k_models"] = dict.fromkeys([kept][: len(state["best_k_models"])], state["best_model_score"])


def _ends_a_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer has stepped after this batch, and is not still accumulating gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def data_of(trainer: pl.Trainer) -> EpisodeDataModule:
    """Return the data module that a trainer uses."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, EpisodeDataModule)
    return data


def _log_every(trainer: pl.Trainer) -> int:
    return int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
