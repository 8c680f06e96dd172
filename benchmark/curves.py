"""Draws return against environment steps from CSVs written by collect.py, a panel per task.

    python benchmark/curves.py benchmark/returns.csv benchmark/dpmd.csv --out benchmark/returns.png

Lines are means and bands standard deviations over the evaluation episodes of all seeds. With
--spread a second row shows the spread of the samples of one state.
"""

import csv
import dataclasses
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """CSVs with columns env_id, method, seed, step, episode, return, length[, spread]"""
    out: Path = Path("benchmark/returns.png")
    """the figure to write"""
    spread: bool = False
    """add a row of panels with the spread"""


def read(files, column):
    """{env_id: {method: {step: [values]}}}; empty cells are left out."""
    table = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in files:
        for row in csv.DictReader(path.open()):
            if row.get(column):
                table[row["env_id"]][row["method"]][int(row["step"])].append(float(row[column]))
    return table


def draw(axis, methods, order):
    for method, steps in methods.items():
        x = np.array(sorted(steps))
        mean, std = (np.array([f(steps[step]) for step in x]) for f in (np.mean, np.std))
        color = f"C{order.index(method)}"
        axis.plot(x / 1000, mean, color=color, label=method)
        axis.fill_between(x / 1000, mean - std, mean + std, color=color, alpha=0.15, lw=0)
    axis.set_xlabel("environment steps (thousands)")
    axis.grid(alpha=0.3)


def main(args):
    rows = [("return", "evaluation return"), ("spread", "spread of samples")][: 1 + args.spread]
    returns = read(args.files, "return")
    order = list(dict.fromkeys(m for methods in returns.values() for m in methods))
    size = (4.6 * len(returns), 3.2 * len(rows))
    figure, axes = plt.subplots(len(rows), len(returns), figsize=size, squeeze=False)
    for row, (column, label) in zip(axes, rows, strict=True):
        for axis, (env_id, methods) in zip(row, read(args.files, column).items(), strict=True):
            draw(axis, methods, order)
            axis.set_title(env_id)
        row[0].set_ylabel(label)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
