"""Run directories: the paths in them, locking, and whether one is taken.

The command line imports this file, so it imports neither PyTorch nor Lightning.
"""

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fewshot.errors import FewShotError
from fewshot.models import is_model, require
from fewshot.paths import ROOT
from fewshot.processes import rank


def last_checkpoint(run_dir: Path) -> Path:
    """Return the path of the checkpoint to resume from."""
    return run_dir / "checkpoints" / "last.ckpt"


def new_run_dir(name: str) -> Path:
    """Return the default run directory, ``outputs/DATE/TIME_NAME``, as on the command line."""
    now = datetime.now()  # local time
    return ROOT / "outputs" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}"


def best_checkpoint(run_dir: Path) -> Path:
    """Return the path of the checkpoint with the best validation accuracy."""
    return run_dir / "checkpoints" / "best.ckpt"


def checkpoint_at(path: Path) -> Path:
    """Return the checkpoint of a place: a file, the best one of a run directory or its ``checkpoints``, or a model's.

    Raises:
        FewShotError: the weights of the model have changed.
    """
    if is_model(path.as_posix()):
        model = require(path.as_posix())
        model.check()
        return model.weights
    if not path.is_dir():
        return path
    inside = path / best_checkpoint(path).name
    return inside if inside.is_file() else best_checkpoint(path)


def results_file(run_dir: Path) -> Path:
    """Return the path of the results, which exist once the run is complete."""
    return run_dir / "results.json"


def newest_run(folder: Path) -> Path:
    """Return the complete run below a directory that finished last.

    Raises:
        FewShotError: there is none.
    """
    runs = [path.parent for path in folder.rglob(results_file(Path()).name) if best_checkpoint(path.parent).is_file()]
    if not runs:
        raise FewShotError(
            f"there is no complete run below {folder}; train one, or name one elsewhere with checkpoint=RUN_DIR"
        )
    return max(runs, key=lambda run: results_file(run).stat().st_mtime_ns)


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Lock a run directory inside the ``with`` block.

    Raises:
        FewShotError: another run is using it.
    """
    lock = FileLock(run_dir / ".lock", timeout=0)
    if rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise FewShotError(
                f"another run is using {run_dir}; wait until it ends, or choose another directory with "
                "hydra.run.dir=PATH"
            ) from None
    try:
        yield
    finally:
        lock.release()


def has_run(run_dir: Path) -> bool:
    """Whether a run has saved anything in a directory."""
    return last_checkpoint(run_dir).exists() or results_file(run_dir).exists()


def is_taken(run_dir: Path) -> bool:
    """Whether a directory belongs to another run, which has saved something there or is using it.

    For ranks other than 0 the directory always counts as taken, because rank 0 of their own run may be using it.
    """
    if rank() != 0 or has_run(run_dir):
        return True
    lock = run_dir / ".lock"
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True
