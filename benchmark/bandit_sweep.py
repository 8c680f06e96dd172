"""What the claims of figures 2 and 3 depend on: each choice of simpo_bandit.py changed alone.

    python benchmark/bandit_sweep.py --figure 2 --out benchmark/bandit_sweep2.csv
    python benchmark/bandit_sweep.py --figure 3 --out benchmark/bandit_sweep3.csv

Every row is one method on one landscape over --num-seeds seeds: at_best is the share of seeds that
end at the higher optimum, regrets are as in the script's summary.csv.
"""

import argparse
import csv
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

import simpo_bandit as bandit

ESCAPE = bandit.LANDSCAPES["escape"]


def escape(m=(-1, 1.5), h=0.7, s=(0.4, 0.4), std=0.8):
    """The landscape `escape` with some of its numbers changed; the policy starts at m[0]."""
    return bandit.make_landscape(m, (h, 1), s, m[0], std)


LANDSCAPES = {  # shifts are 6 to 10 % of the distance 2.5; heights and widths 14 and 20 %
    "as it is": ESCAPE,
    "lower optimum at -1.25": escape(m=(-1.25, 1.5)),
    "lower optimum at -0.75": escape(m=(-0.75, 1.5)),
    "best at 1.35": escape(m=(-1, 1.35)),
    "best at 1.65": escape(m=(-1, 1.65)),
    "best at 1": escape(m=(-1, 1)),
    "lower height 0.6": escape(h=0.6),
    "lower height 0.8": escape(h=0.8),
    "widths 0.32": escape(s=(0.32, 0.32)),
    "widths 0.48": escape(s=(0.48, 0.48)),
    "initial std 0.64": escape(std=0.64),
    "initial std 0.96": escape(std=0.96),
}
HYPERPARAMETERS = {
    "neg_clip": (-0.05, -0.1, -0.2, -0.4, -0.8, -1.0),
    "neg_until": (0.25, 1.0, math.inf),
    "noise": (0.0, 0.2, 0.3, 0.5),
    "lam": (0.125, 0.5, 1.0),
    "eps_kl": (1.0, 1.5, 2.0),
    "policy_lr": (1e-3, 4e-3),
    "grad_steps": (8, 128),
    "num_samples": (32, 128),
}
METHODS = {name: ("linear_neg",) for name in HYPERPARAMETERS}  # all four where not named
METHODS |= {name: ("linear", "linear_neg") for name in ("noise", "lam", "eps_kl")}
WIDTHS = (0.02, 0.05, 0.1, 0.5, 0.9)  # of both optima of figure 3


def runs(figure, base):
    """(what is changed, to what, arguments, landscape) of every run."""
    if figure == "3":
        for width in WIDTHS:
            two = bandit.make_landscape((-1, 1), (1, 1), (width, width), 0, 0.6)
            yield "width", f"{width:g}", base, two
            yield "width", f"{width:g}, noise 0.2", dataclasses.replace(base, noise=0.2), two
        return
    for name, landscape in LANDSCAPES.items():
        yield "landscape", name, base, landscape
    for name, values in HYPERPARAMETERS.items():
        for value in values:
            yield name, f"{value:g}", dataclasses.replace(base, **{name: value}), ESCAPE
    # is the paper's -0.05 only slow?
    slow = dataclasses.replace(base, neg_clip=-0.05, grad_steps=256, policy_lr=4e-3)
    yield "neg_clip", "-0.05 with 256 steps of 0.004", slow, ESCAPE


def measure(args, landscape, method, epochs, bar):
    """{column: number} of one method on one landscape."""
    keys = bandit.seed_keys(args)
    learners = bandit.init_learners(args, landscape, keys)
    curve = bandit.train_curve(args, method, landscape, learners, keys, epochs, bar)
    return bandit.curve_summary(landscape, *curve)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", choices=("2", "3"), required=True)
    parser.add_argument("--num-seeds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3001, help="first seed")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    base = bandit.Args(num_seeds=flags.num_seeds, seed=flags.seed)
    with flags.out.open("w", newline="") as file, tqdm(disable=None, unit="epoch") as bar:
        for changed, value, args, landscape in runs(flags.figure, base):
            for method in bandit.methods(args, flags.figure):
                if method.name not in METHODS.get(changed, (method.name,)):
                    continue
                bar.set_description(f"{changed} {value} {method.name}")
                numbers = measure(args, landscape, method, {"2": 200, "3": 100}[flags.figure], bar)
                row = {"changed": changed, "to": value, "method": method.name}
                row |= {name: f"{x:.4f}" for name, x in numbers.items()}
                if not file.tell():
                    writer = csv.DictWriter(file, row)
                    writer.writeheader()
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
