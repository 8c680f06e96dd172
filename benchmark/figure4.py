"""Draws the reward functions of simpo_dmc.py against speed, as figure 4 of the paper.

python benchmark/figure4.py
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simpo_dmc


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("benchmark/figure4.png")
    """the figure to write"""


def curve(domain, reward, speeds):
    """--reward of {domain}-run at each speed (m/s); of a walker that stands upright."""
    args, top = simpo_dmc.Args(domain=domain, reward=reward), simpo_dmc.TOP_SPEED[f"{domain}-run"]
    return [simpo_dmc.landscape(args, v, (5 * v / top + 1) / 6) for v in speeds]


def main(args):
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
    for axis, domain in zip(axes, ("cheetah", "walker"), strict=True):
        speeds = np.linspace(0, simpo_dmc.TOP_SPEED[f"{domain}-run"], 201)
        for reward in ("sqrt", "linear", "square", "exp"):
            axis.plot(speeds, curve(domain, reward, speeds), label=reward)
        axis.set_title(f"{domain}-run" + ", upright" * (domain == "walker"))
        axis.set_xlabel("speed (m/s)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward of a step")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
