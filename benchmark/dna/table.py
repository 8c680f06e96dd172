"""Joins metrics.csv and peers.csv of run folders, and prints their medians over seeds.

    python benchmark/dna/table.py runs/table3/* --out benchmark/dna/table.csv

A folder is named {data}__{method}__{seed}, as benchmark/run.py names it, and its tuned model's row
after it. Columns: data, seed, those of metrics.csv, and kl_pretrained of finetune.csv, its mean
over the last 10 iterations. The rows of pretrained, best-of-n and smc are taken once a seed.
Printed are medians, in brackets the range of the scores over seeds.
"""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import tyro
from divergence import fail, look, split_name

# column: heading, digits
PRINTED = {
    "ft": ("optimised score", 2),
    "ft_shuffled": ("shuffled", 2),
    "eval": ("held-out score", 2),
    "eval_shuffled": ("shuffled", 2),
    "kl_pretrained": ("KL", 0),
    "log_lik": ("log-lik.", 0),
    "corr_3mer": ("3-mers", 2),
    "corr_motif": ("motifs", 2),
    "gc": ("G + C", 2),
    "unique": ("distinct", 2),
}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    out: Path = Path("benchmark/dna/table.csv")  # the CSV to write


def read_rows(runs):
    """{(data, method, seed): row of metrics.csv or peers.csv} of the folders that have one."""
    rows = {}
    for path in (run_dir / name for run_dir in runs for name in ("metrics.csv", "peers.csv")):
        if path.exists():
            data, method, seed = split_name(path.parent)
            with path.open() as file:
                new = list(csv.DictReader(file))
            curve = path.with_name("finetune.csv")
            if path.name == "metrics.csv" and curve.exists():  # its last row is the tuned model
                kl = np.genfromtxt(curve, delimiter=",", names=True, ndmin=1)["kl_pretrained"]
                new[-1] |= {"method": method, "kl_pretrained": f"{kl[-10:].mean():.4g}"}
            for row in new:
                row.setdefault("kl_pretrained", "nan")
                rows.setdefault((data, row["method"], seed), row)
    return rows


def table(rows):
    """Lines of a Markdown table: for each method medians over seeds, of scores (min to max)."""
    headings = "data", "method", "seeds", *(heading for heading, _ in PRINTED.values())
    yield "| " + " | ".join(headings) + " |"
    yield "|---" * len(headings) + "|"
    for data, method in dict.fromkeys(key[:2] for key in rows):
        seeds = [row for key, row in rows.items() if key[:2] == (data, method)]
        cells = []
        for name, (_, digits) in PRINTED.items():
            x = np.array([float(row[name]) for row in seeds])
            spread = f" ({x.min():.{digits}f} to {x.max():.{digits}f})"
            shown = spread if name in ("ft", "eval") and np.ptp(x) else ""
            cells.append(f"{np.median(x):.{digits}f}{shown}" if np.isfinite(x).all() else "-")
        yield f"| {data} | {look(method)['label']} | {len(seeds)} | " + " | ".join(cells) + " |"


def main(args):
    rows = read_rows(args.runs)
    if not rows:
        fail("none of the folders has a metrics.csv, which a complete run has")
    with args.out.open("w", newline="") as file:
        columns = "data", "seed", *next(iter(rows.values()))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"data": k[0], "seed": k[2], **row} for k, row in rows.items())
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(tyro.cli(Args))
