"""Draws early.csv: the first steps of three tasks, by the choices that the paper leaves open.

    python benchmark/mujoco/early.py --out early.png

docs/mujoco.md has the commands behind the rows and explains A to G. One seed each.
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VARIANTS = {  # in early.csv: label, colour
    "newest policy": ("A newest policy", "tab:gray"),
    "pi_old, M = 1": ("B copy every 250 updates", "tab:olive"),
    "pi_old, M = 4": ("C best of 4 and 8", "tab:cyan"),
    "pi_old, M = 4, noise 0.1, smaller critic": ("D less noise, smaller critic", "tab:pink"),
    "slow copy, noise 0.5 to 0.1": ("E slow copy, falling noise", "tab:brown"),
    "slow copy, noise 0.5 to 0.1, an update a step": ("E, an update a step", "tab:purple"),
    "two critic steps, copies at 0.02": ("F two critic steps, faster copies", "tab:red"),
    "noise 0.5 to 0.2 over the run": ("G noise to 0.2 over the whole run", "tab:blue"),
    "noise 0.5 to 0.1 over the run": ("G, but to 0.1", "tab:orange"),
}


def main(out: Path = Path("early.png")):
    curves = defaultdict(list)
    with (Path(__file__).parent / "early.csv").open() as file:
        for row in csv.DictReader(file):
            point = float(row["step"]) / 1000, float(row["mean_return"])
            curves[row["task"], row["variant"]].append(point)
    tasks = sorted({task for task, _ in curves})
    figure, axes = plt.subplots(1, len(tasks), figsize=(10, 3), layout="constrained")
    for axis, task in zip(axes, tasks, strict=True):
        for variant, (_, colour) in VARIANTS.items():
            if (task, variant) in curves:
                axis.plot(*zip(*curves[task, variant], strict=True), color=colour)
        axis.set(title=task, xlabel="environment steps / 1000", xlim=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return")
    handles = [plt.Line2D([], [], color=colour, label=x) for x, colour in VARIANTS.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    tyro.cli(main)
