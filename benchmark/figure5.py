"""Draws return against environment steps from run folders of simpo_dmc.py, as figure 5: a panel
for each reward and in it a curve for each weighting.

    python benchmark/figure5.py runs/dmc/*

A seed's value at a step is the mean over its evaluation episodes; curves are means and bands
standard errors (std with n - 1, over sqrt n) over the seeds of a curve, none for one seed. Steps
that not all of them have reached are left out. Writes the figure and what it shows as a CSV with
columns task, reward, weighting, step, seeds, mean, standard_error (empty for one seed).
"""

import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ORDER = ("sqrt", "linear", "square", "exp", "stock")  # of the panels, from flat to steep
LABELS = {"return": "return", "stock_return": "stock return", "speed": "mean speed (m/s)"}
# what the runs of one figure may differ in
FREE = {"seed", "run_dir", "reward", "weighting", "power", "neg_clip", "capture_video", "track"}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    column: Literal["return", "stock_return", "speed"] = "return"
    """column of eval.csv: return under the reward trained on, under dm_control's, or m/s"""
    out: Path = Path("benchmark/figure5.png")
    """the figure to write, and beside it the CSV of the same name"""


def weighting(args):
    """Name of a curve: --weighting and what goes with it."""
    name = args["weighting"] + (f" {args['power']:g}" if args["power"] else "")
    return name + (f", clip {args['neg_clip']:g}" if args["neg_clip"] else "")


def read(runs, column):
    """Run folders -> task, {(reward, weighting): {seed: {step: mean over episodes}}}."""
    curves, first = defaultdict(dict), None
    for run_dir in runs:
        try:
            args = json.loads((run_dir / "args.json").read_text())
            rows = list(csv.DictReader((run_dir / "eval.csv").open()))
        except OSError as error:
            raise SystemExit(f"error: {run_dir} has no evaluation yet: {error}") from None
        fixed = {name: value for name, value in args.items() if name not in FREE}
        first = first or fixed
        for name in fixed.keys() | first.keys():
            if fixed.get(name) != first.get(name):
                raise SystemExit(f"error: {run_dir} differs from {runs[0]} in {name}")
        values = defaultdict(list)
        for row in rows:
            values[int(row["step"])].append(float(row[column]))
        seeds = curves[args["reward"], weighting(args)]
        if args["seed"] in seeds:
            raise SystemExit(f"error: {run_dir} repeats a curve's seed {args['seed']}")
        seeds[args["seed"]] = {step: np.mean(x) for step, x in values.items()}
    return f"{first['domain']}-{first['task']}", curves


def average(seeds):
    """{seed: {step: value}} -> steps [S], mean [S], standard error [S] (nan for one seed), n."""
    steps = sorted(set.intersection(*(set(x) for x in seeds.values())))
    values = np.array([[x[step] for step in steps] for x in seeds.values()])
    n = len(values)
    error = values.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(steps), np.nan)
    return np.array(steps), values.mean(axis=0), error, n


def main(args):
    if not args.runs:
        raise SystemExit("error: no run folders given")
    task, curves = read(args.runs, args.column)
    rewards = [name for name in ORDER if any(reward == name for reward, _ in curves)]
    names = list(dict.fromkeys(name for _, name in sorted(curves)))
    size = (4.2 * len(rewards), 3.4)
    figure, axes = plt.subplots(1, len(rewards), figsize=size, squeeze=False)
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = "task reward weighting step seeds mean standard_error"
        writer.writerow(columns.split())
        for axis, reward in zip(axes[0], rewards, strict=True):
            for name in (name for name in names if (reward, name) in curves):
                steps, mean, error, n = average(curves[reward, name])
                color = f"C{names.index(name)}"
                axis.plot(steps / 1000, mean, color=color, label=f"{name} ({n})")
                axis.fill_between(
                    steps / 1000, mean - error, mean + error, color=color, alpha=0.2, lw=0
                )
                for step, m, e in zip(steps, mean, error, strict=True):
                    cell = "" if np.isnan(e) else f"{e:.6f}"
                    writer.writerow([task, reward, name, step, n, f"{m:.6f}", cell])
            axis.set_title(f"{task}, {reward} reward")
            axis.set_xlabel("environment steps (thousands)")
            axis.legend(frameon=False, fontsize=8, title="weighting (seeds)", title_fontsize=8)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(LABELS[args.column])
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
