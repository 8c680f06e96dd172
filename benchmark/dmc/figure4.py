"""Draws the reward functions of simpo_dmc.py against speed, as figure 4 of the paper.

python benchmark/dmc/figure4.py --out benchmark/dmc/figure4.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.figure import Figure

import simpo_dmc as simpo


def curve(domain, reward, speeds):
    """--reward of {domain}-run at each speed, m/s; of a walker that stands upright."""
    args, top = (
        simpo.Args(domain=domain, task="run", reward=reward),
        simpo.TOP_SPEED[f"{domain}-run"],
    )
    return [simpo.landscape(args, v, (5 * v / top + 1) / 6) for v in speeds]


def draw():
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, domain in zip(axes, ("cheetah", "walker"), strict=True):
        speeds = np.linspace(0, simpo.TOP_SPEED[f"{domain}-run"], 201)
        for reward, shade in zip(
            ("sqrt", "linear", "square", "exp"), (0.75, 0.5, 0.25, 0), strict=True
        ):
            axis.plot(speeds, curve(domain, reward, speeds), color=str(shade), label=reward)
        axis.set_title(f"{domain}-run" + ", upright" * (domain == "walker"))
        axis.set_xlabel("speed, m/s")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward of a step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="figure4.png", help="the figure to write")
    draw().savefig(parser.parse_args().out, dpi=100)
