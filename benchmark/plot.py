"""Draws learning curves from run folders, or from CSVs of benchmark.results.

    python -m benchmark.plot runs/* --out runs/returns.png
    python -m benchmark.plot benchmark/mujoco/table2.csv --paper --out table2.png

A panel for each task, a curve for each method, and for each set of flags where runs of
a method differ. A run's value at a step is the mean over the episodes of an evaluation.
A curve is the mean over seeds where all of them have values, its band the 95 %
bootstrap interval of that mean. Dotted is a run of an older trainer.
"""

from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from scipy.stats import bootstrap

from benchmark.results import (
    COLOURS,
    OLDER,
    PUBLISHED,
    Paths,
    fail,
    group_runs,
    read_runs,
)


def average(runs, name):
    """Runs of one curve -> x [n] that all have reached, mean [n], and the bounds [n] of
    its 95 % interval, which for one seed equal the mean."""
    first = max(run.x[0] for run in runs)
    last = min(run.x[-1] for run in runs)
    x = np.unique(np.concatenate([run.x for run in runs]))
    x = x[(first <= x) & (x <= last)]
    if len(x) == 0:
        fail(f"the seeds of {name} have no x in common")
    y = [np.interp(x, run.x, run.y) for run in runs]
    mean = np.mean(y, axis=0)
    if len(runs) == 1:
        return x, mean, mean, mean
    options = {"method": "percentile", "n_resamples": 2000, "rng": 0}
    low, high = bootstrap([y], np.mean, **options).confidence_interval
    return x, mean, low, high


def looks(names):
    """-> {name: colour and line style}. The paper's methods have one colour in all
    figures, others have colours as far apart as possible."""
    methods = dict.fromkeys(name.removesuffix(OLDER) for name in names)
    others = [method for method in methods if method not in COLOURS]
    apart = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(others)))
    colours = COLOURS | dict(zip(others, apart, strict=True))
    found = {}
    for name in names:
        style = ":" if name.endswith(OLDER) else "-"
        found[name] = {"color": colours[name.removesuffix(OLDER)], "ls": style}
    return found


def draw_published(axis, task, names):
    """Draws the paper's means of these methods and of TD3, dashed."""
    for name in ("TD3", *dict.fromkeys(name.removesuffix(OLDER) for name in names)):
        tasks = PUBLISHED.get(("paper", name), {})
        if task in tasks:
            mean, _ = tasks[task]
            colour = COLOURS.get(name, "grey")
            axis.axhline(mean, color=colour, ls="--", lw=1)


def draw(curves, x, y, paper, note):
    """-> figure of {(task, name): [Run of each seed]}."""
    tasks = list(dict.fromkeys(task for task, _ in curves))
    look = looks(dict.fromkeys(name for _, name in curves))
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(3.6 * columns, 4.8), 2.7 * rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    handles = {}
    for axis, task in zip(axes.flat, tasks, strict=False):
        names = [name for other, name in curves if other == task]
        for name in names:
            runs = curves[task, name]
            at, mean, low, high = average(runs, f"{task}, {name}")
            marker = "o" if len(at) == 1 else None
            (line,) = axis.plot(at, mean, marker=marker, **look[name])
            axis.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
            seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
            handles[f"{name}, {seeds}"] = line
        if paper:
            draw_published(axis, task, names)
        axis.margins(y=0.07)  # no line lies on the frame
        axis.set_title(task, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("environment steps" if x == "step" else x)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    figure.supylabel(y, fontsize=10)
    if note:
        axis = axes.flat[0]
        axis.text(0.97, 0.05, note, ha="right", fontsize=9, transform=axis.transAxes)
    if paper:
        dashed = plt.Line2D([], [], color="black", ls="--", lw=1)
        handles["the paper's mean after 1M steps, in the method's colour"] = dashed
        handles["TD3 in the paper"] = plt.Line2D([], [], color="grey", ls="--", lw=1)
    letters = 13 * figure.get_figwidth()  # in a line of the legend
    columns = max(1, int(letters / (max(map(len, handles)) + 8)))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
    return figure


def main(
    files: Paths,
    out: Path = Path("returns.png"),
    y: str = "return",
    x: Literal["step", "minutes"] = "step",
    paper: bool = False,
    note: str = "",
):
    """Draw learning curves.

    Args:
        files: run folders or CSVs of benchmark.results; other folders are passed over
        out: the figure to write; its suffix says of which kind
        y: column of eval.csv or of the CSV
        x: column of the same
        paper: add the paper's values of these methods, and TD3's
        note: a text in the first panel
    """
    if paper and y != "return":
        fail("--paper has returns only")
    curves = group_runs(read_runs(files, x, y))
    figure = draw(curves, x, y, paper, note)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f"wrote {out}")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (OSError, ValueError) as error:  # also a suffix that matplotlib lacks
        fail(error)
