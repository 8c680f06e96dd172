"""Joins runs of simpo_dna.py into a CSV, a table of medians over seeds, and a figure.

    python -m benchmark.dna.results runs/table3/*

Run folders are named {data}__{method}__{seed}. Rows of table.csv come from metrics.csv
and baselines.csv, those of the untrained once for each seed. top_share is the held-out
score as a share of the real HepG2 sites' 99.9 % quantile; kl_pretrained, the estimate
of the KL in nats a sequence, and w_kl are means over the last tenth of finetune.csv.
curves.csv has the judged rows of finetune.csv. The figure shows their held-out score
against the KL; a dot ends a run, dashes are of other data than the generated set.
"""

import csv
import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from dna.data import REWARD

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
PRINTED = {  # column: digits
    "ft": 2,
    "eval": 2,
    "top_share": 2,
    "eval_shuffled": 2,
    "w_kl": 2,
    "kl_pretrained": 0,
    "log_lik": 0,
    "js_6mer": 3,
    "motif_ratio": 2,
    "gc": 2,
    "unique": 2,
    "distance": 0,
}
CURVE = ("step", "q_median", "eval_median", "kl_pretrained", "kl", "w_kl")


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders, {data}__{method}__{seed}
    out: Path = HERE  # folder of table.csv, curves.csv and divergence.png


def read_curve(run):
    return np.genfromtxt(run / "finetune.csv", delimiter=",", names=True, ndmin=1)


def read_run(run, method):
    """Rows {name: {column: number}} of one folder."""
    top = json.loads(REWARD.read_text())["eval"]["top"]
    curve = read_curve(run)
    last = curve[-max(len(curve) // 10, 1) :]
    rows = {}
    for path in (run / "metrics.csv", run / "baselines.csv"):
        if not path.exists():
            continue
        for row in csv.DictReader(path.open()):
            name = row.pop("method")
            row["top_share"] = f"{float(row['eval']) / top:.4g}"
            tuned = name == "finetuned"
            for column in ("kl_pretrained", "w_kl"):
                row[column] = f"{np.nanmean(last[column]):.4g}" if tuned else "nan"
            rows[method if tuned else name] = row
    return rows


def table_lines(rows):
    """Lines of Markdown: medians over seeds, and the range of the scores."""
    lines = [
        "| " + " | ".join(["data", "method", "seeds", *PRINTED]) + " |",
        "|---" * (len(PRINTED) + 3) + "|",
    ]
    groups = {}
    for row in rows:
        groups.setdefault((row["data"], row["method"]), []).append(row)
    for (data, method), seeds in groups.items():
        cells = [data, method, str(len(seeds))]
        for column, digits in PRINTED.items():
            values = np.array([float(row[column]) for row in seeds])
            low = f"{values.min():.{digits}f}"
            high = f"{values.max():.{digits}f}"
            cell = f"{np.median(values):.{digits}f}"
            if column in ("ft", "eval") and low != high:
                cell += f" ({low} to {high})"
            cells.append(cell.replace("nan", "-"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw_curve(axis, curve, method, style, colours):
    """Held-out score against the KL; a colour a method."""
    label = None if method in colours else method
    colour = colours.setdefault(method, f"C{len(colours)}")
    axis.plot(
        curve["kl_pretrained"],
        curve["eval_median"],
        style,
        color=colour,
        label=label,
        marker="o",
        markevery=[-1],
        ms=4,
    )


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(args):
    rows = {}
    curve_rows = []
    colours = {}
    figure, axis = plt.subplots(figsize=(7, 5))
    for run in args.runs:
        parts = run.name.split("__")
        if len(parts) != 3 or not (run / "metrics.csv").exists():
            raise SystemExit(f"error: {run} is no complete DATA__METHOD__SEED")
        data, method, seed = parts
        for name, row in read_run(run, method).items():
            names = {"data": data, "method": name, "seed": seed}
            rows.setdefault((data, name, seed), names | row)
        curve = read_curve(run)
        curve = curve[np.isfinite(curve["kl_pretrained"])]
        for judged in curve:
            row = {"data": data, "method": method, "seed": seed}
            for name in CURVE:
                row[name] = f"{judged[name]:.4g}"
            curve_rows.append(row)
        style = "-" if data == "generated" else "--"
        draw_curve(axis, curve, method, style, colours)
    axis.set_xlabel("estimate of the KL to the pretrained model, nats a sequence")
    axis.set_ylabel("held-out score of the samples")
    axis.legend(fontsize=8)
    figure.savefig(args.out / "divergence.png", dpi=80, bbox_inches="tight")
    rows = list(rows.values())
    write_rows(args.out / "table.csv", rows)
    write_rows(args.out / "curves.csv", curve_rows)
    print(*table_lines(rows), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
