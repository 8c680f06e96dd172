"""Median over seeds of the policies' spread in the first epochs of figure 2, Linear and Lin. Neg.

python benchmark/bandit_spread.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import simpo_bandit as bandit

EPOCHS = (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 30, 40, 59)

if __name__ == "__main__":
    args, landscape = bandit.Args(), bandit.LANDSCAPES["escape"]
    keys = bandit.seed_keys(args)
    start = bandit.init_learners(args, landscape, keys)
    print("epoch      " + "".join(f"{epoch:8d}" for epoch in EPOCHS))
    for method in bandit.methods(args, "2")[::3]:
        _, metrics = bandit.train_epochs(
            args, method, 60, landscape, start, keys, np.int32(0), np.float32(200)
        )
        spread = np.median(metrics["spread"], axis=1)
        print(f"{method.name:11s}" + "".join(f"{spread[epoch]:8.4f}" for epoch in EPOCHS))
