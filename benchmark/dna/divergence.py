"""Held-out score against KL to the pretrained model, one curve a method, over the iterations.

    python benchmark/dna/divergence.py runs/table3/*

Run folders are named {data}__{method}__{seed}, as benchmark/run.py names them. Of their
finetune.csv it takes kl_pretrained, the bound on the KL in nats a sequence, and eval_median, the
held-out score of the iteration's samples; the mean over seeds is drawn after a running mean over 5
iterations, with a dot at the last. Where two methods have the same KL the one above pays less for
its score.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from paper import COLOURS, NAMES
from results import fail

OTHERS = {"wd1": "tab:brown", "uniform": "black"}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    out: Path = Path("benchmark/dna/divergence.png")
    csv: Path = Path("benchmark/dna/divergence.csv")
    smooth: int = 5  # iterations


def split_name(run):
    """data, method and seed of a run folder's name."""
    if len(parts := run.name.split("__")) != 3 or not parts[2].isdigit():
        fail(f"{run} is not named DATA__METHOD__SEED, as benchmark/run.py names its runs")
    return parts[0], parts[1], int(parts[2])


def read_curves(runs):
    """{(data, method): [seeds, iterations, 2]} of KL and score, cut to the shortest run."""
    curves = {}
    for run in runs:
        if (run / "finetune.csv").exists():
            data, method, _ = split_name(run)
            table = np.genfromtxt(run / "finetune.csv", delimiter=",", names=True, ndmin=1)
            columns = np.stack([table["kl_pretrained"], table["eval_median"]], axis=1)
            curves.setdefault((data, method), []).append(columns)
    return {k: np.stack([c[: min(map(len, v))] for c in v]) for k, v in curves.items()}


def look(method):
    """Colour of the weighting, line style and label of a method such as linear_neg1_floor."""
    weighting, *notes = method.split("_")
    clip = next((x.removeprefix("neg") for x in notes if x.startswith("neg")), "")
    name = NAMES.get(weighting + "_neg" * bool(clip), weighting)
    style = ":" if notes[-1:] in (["floor"], ["anchor"]) else "--" if clip == "0.05" else "-"
    label = " ".join([name, *([f"-{clip}", *notes[1:]] if clip else notes)])
    return {"color": COLOURS.get(name) or OTHERS.get(name), "ls": style, "label": label}


def main(args):
    curves = read_curves(args.runs)
    if not curves:
        fail("none of the folders has a finetune.csv")
    datasets = list(dict.fromkeys(data for data, _ in curves))
    fig, axes = plt.subplots(1, len(datasets), figsize=(6.5 * len(datasets), 5), squeeze=False)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("data", "method", "iteration", "seeds", "kl_pretrained", "eval_median"))
        for (data, method), values in curves.items():
            for i, (kl, score) in enumerate(values.mean(axis=0), start=1):
                writer.writerow((data, method, i, len(values), f"{kl:.4g}", f"{score:.4g}"))
            window = np.ones(args.smooth) / args.smooth
            mean = values.mean(axis=0).T
            if mean.shape[1] >= args.smooth:
                mean = np.stack([np.convolve(row, window, "valid") for row in mean])
            axis = axes[0, datasets.index(data)]
            axis.plot(*mean, marker="o", markevery=[-1], ms=4, **look(method))
    for axis, data in zip(axes[0], datasets, strict=True):
        axis.set(title=data, xlabel="KL to the pretrained model, nats a sequence (bound)")
        axis.set_ylabel("held-out score of the samples")
        axis.set_xscale("log")
        axis.set_xlim(left=1)
        axis.legend(fontsize=8, loc="upper left")
    fig.savefig(args.out, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args))
