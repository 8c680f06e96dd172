"""What the claim of figure 2 depends on: one choice of simpo_bandit.py changed at a time.

    python benchmark/bandit/sweep.py --out benchmark/bandit/sweep.csv

Each row is one method on the landscape `escape` over --num-seeds seeds, with the columns of the
script's summary.csv.
"""

import argparse
import csv
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import simpo_bandit as bandit

ESCAPE = bandit.LANDSCAPES["escape"]
ROWS = [  # what is changed, flags of the script, the landscape
    ("nothing", {}, ESCAPE),
    ("neg_clip -0.05, the paper's", {"neg_clip": -0.05}, ESCAPE),
    ("neg_clip -0.2", {"neg_clip": -0.2}, ESCAPE),
    ("neg_clip -0.4", {"neg_clip": -0.4}, ESCAPE),
    ("the clip stays", {"neg_until": math.inf}, ESCAPE),
    ("no noise", {"noise": 0.0}, ESCAPE),
    ("noise 0.2", {"noise": 0.2}, ESCAPE),
    ("lam 1", {"lam": 1.0}, ESCAPE),
    ("lam by its dual, eps_kl 1.5", {"eps_kl": 1.5}, ESCAPE),
    ("128 gradient steps", {"grad_steps": 128}, ESCAPE),
    ("best optimum at 1", {}, ESCAPE._replace(m=np.float32((-1, 1)))),
]


def measure(args, landscape):
    """(method, summary of its curve) of Linear and Lin. Neg., or of Lin. Neg. alone."""
    keys = bandit.seed_keys(args)
    learners = bandit.init_learners(args, landscape, keys)
    for name, curve in bandit.methods(args, "2").items():
        alone = args.neg_clip is not None or args.neg_until != bandit.Args.neg_until
        if name == "linear_neg" or (name == "linear" and not alone):
            regret, samples = bandit.train_curve(curve, landscape, learners, keys, 200)
            yield name, bandit.curve_summary(landscape, regret, samples)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-seeds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3001, help="first seed")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    base = bandit.Args(num_seeds=flags.num_seeds, seed=flags.seed)
    with flags.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["changed", "method", *bandit.SUMMARY.split(",")])
        for changed, values, landscape in ROWS:
            for name, summary in measure(dataclasses.replace(base, **values), landscape):
                writer.writerow([changed, name, *(f"{x:.4f}" for x in summary)])
                file.flush()


if __name__ == "__main__":
    main()
