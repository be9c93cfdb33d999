"""Figure of where the time of a training step goes."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.maml import TASK, ours
from benchmarks.profiling import KINDS_AND_ELSE, convolution_peak, profile_step
from benchmarks.training import MINIIMAGENET, OMNIGLOT, bare_loop
from fewshot.checks import Count
from fewshot.hardware import keep_freed_memory
from fewshot.style import COLOURS, STYLE, WIDTH
from figures.shared import save


def time_profile(rounds: Count, out: Path) -> list[Path]:
    """Draw where the time of a training step goes, and how long its arithmetic would take at this processor's peak.

    The peak is that of a large convolution, measured with all threads.

    Args:
        rounds: how often each step is timed; the median counts.
        out: an existing directory.

    Returns:
        The file written.
    """
    keep_freed_memory()
    peak = convolution_peak(rounds)
    steps = {
        "prototypical networks, Omniglot\n60-way 1-shot 5 queries": bare_loop({**OMNIGLOT, "steps": 1}),
        "prototypical networks, miniImageNet\n20-way 5-shot 15 queries": bare_loop({**MINIIMAGENET, "steps": 1}),
        "MAML, second order, a loop over tasks\n32 tasks, 5-way 1-shot 1 query": ours(2, "loop", TASK),
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        profiles = {name: profile_step(step, rounds) for name, step in steps.items()}
        labels, left = list(profiles), np.zeros(len(profiles))
        for kind, colour, hatch in zip(KINDS_AND_ELSE, COLOURS, ("", "//", "..", "\\\\", "xx", "--", ""), strict=True):
            widths = np.array([100 * profile.shares[kind] for profile in profiles.values()])
            axes.barh(labels, widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=kind)
            left += widths
        for row, profile in enumerate(profiles.values()):
            bound = 100 * profile.flops / peak / profile.seconds
            axes.plot([bound, bound], [row - 0.47, row + 0.47], color="black", linewidth=2.5, zorder=3)
            label = f"{1e3 * profile.seconds:,.0f} ms, {bound:.0f}% of the peak"
            axes.text(101, row, label, va="center", fontsize=9)
        axes.plot([], [], color="black", linewidth=2.5, label="all arithmetic at the peak")
        axes.set(xlabel="share of the time of a step, %", xlim=(0, 100))
        axes.invert_yaxis()
        axes.grid(False)
        figure.suptitle(f"A training step compared with the measured convolution peak, {peak / 1e9:.0f} GFLOP/s")
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return [save(figure, out / "time_profile.png")]
