"""How long image banks of the real data take to build, with the search for near-duplicate images and without.

    PYTHONPATH=src python tests/bank_time.py

builds each bank in processes of their own, in turns. It prints CPU seconds, so that other work on the machine counts
little, and their ratio.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from statistics import median

import numpy as np
from hydra.utils import instantiate

from fewshot.config import compose
from fewshot.data import audit
from fewshot.data.bank import open_bank

CLASSES = {"omniglot": 1623, "miniimagenet": 10}  # the first ones of each data set
TURNS = 2


def build(name: str, search: bool) -> float:
    """Return the CPU seconds that a bank takes."""
    config = compose(f"dataset={name}").dataset
    source = instantiate(config.source)
    classes = source.classes()[: CLASSES[name]]
    if not search:
        audit.thumbnails = lambda images: np.zeros((len(images), 0), np.uint8)  # type: ignore
        audit.candidates = lambda _: iter(())  # type: ignore
    with tempfile.TemporaryDirectory() as cache:
        begun = time.process_time()
        open_bank(name, replace(source, classes=lambda: classes), {}, cache)
        return time.process_time() - begun


def main() -> None:
    """Print the table, or with two arguments the seconds of one bank."""
    if len(sys.argv) > 1:
        sys.stdout.write(f"{build(sys.argv[1], sys.argv[2] == 'search')}\n")
        return
    for name in CLASSES:
        times: dict[str, list[float]] = {"plain": [], "search": []}
        for _ in range(TURNS):
            for kind, seconds in times.items():
                done = subprocess.run([sys.executable, __file__, name, kind], stdout=subprocess.PIPE, check=True)
                seconds.append(float(done.stdout.splitlines()[-1]))
        plain, search = map(median, times.values())
        sys.stdout.write(f"{name}: {plain:.1f} s without the search, {search:.1f} s with it: x{search / plain:.2f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
