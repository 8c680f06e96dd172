"""Draws the rewards of simpo_dmc.py against speed, as figure 4 of the paper.

python -m benchmark.dmc.figure4 --out benchmark/dmc/figure4.png
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

import simpo_dmc as simpo

SHADES = {"sqrt": "0.75", "linear": "0.5", "square": "0.25", "exp": "0"}


def curve(domain, reward, speeds):
    """Rewards of {domain}-run at speeds in m/s; of a walker that stands upright."""
    args = simpo.Args(domain=domain, task="run", reward=reward)
    top = simpo.TOP_SPEED[f"{domain}-run"]
    rewards = []
    for speed in speeds:
        stock = (5 * speed / top + 1) / 6  # of the walker, up to the top speed
        rewards.append(simpo.landscape(args, speed, stock))
    return rewards


def main(out: Path = Path("figure4.png")):
    figure, axes = plt.subplots(
        1, 2, figsize=(8.4, 3.2), sharey=True, layout="constrained"
    )
    for axis, domain in zip(axes, ("cheetah", "walker"), strict=True):
        speeds = np.linspace(0, simpo.TOP_SPEED[f"{domain}-run"], 201)
        for reward, shade in SHADES.items():
            values = curve(domain, reward, speeds)
            axis.plot(speeds, values, color=shade, label=reward)
        axis.set_title(f"{domain}-run")
        axis.set_xlabel("speed, m/s")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward of a step")
    axes[1].set_title("walker-run, upright")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
