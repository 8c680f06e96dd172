"""Joins metrics.csv and peers.csv of run folders, and prints medians over seeds and their range.

    python benchmark/dna/table.py runs/table3/* --out benchmark/dna/table.csv

A folder is named {data}__{method}__{seed}, as benchmark/run.py names it. Columns: data, seed, those
of metrics.csv. The rows of pretrained, best-of-n and smc are taken once a seed.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    out: Path = Path("benchmark/dna/table.csv")  # the CSV to write


def read_rows(runs):
    """{(data, method, seed): row of metrics.csv or peers.csv} of the folders that have one."""
    rows = {}
    for path in (run_dir / name for run_dir in runs for name in ("metrics.csv", "peers.csv")):
        if path.exists():
            data, _, seed = path.parent.name.split("__")
            with path.open() as file:
                for row in csv.DictReader(file):
                    rows.setdefault((data, row["method"], int(seed)), row)
    return rows


def table(rows):
    """Lines of a Markdown table: for each method the median over seeds, and (min to max)."""
    columns = [name for name in next(iter(rows.values())) if name != "method"]
    yield "| " + " | ".join(("data", "method", "seeds", *columns)) + " |"
    yield "|---" * (len(columns) + 3) + "|"
    for data, method in dict.fromkeys(key[:2] for key in rows):
        seeds = [row for key, row in rows.items() if key[:2] == (data, method)]
        cells = []
        for name in columns:
            x = np.array([float(row[name]) for row in seeds])
            digits = 0 if name == "oracle_calls" else 1 if name == "log_lik" else 3
            spread = f" ({x.min():.{digits}f} to {x.max():.{digits}f})" if np.ptp(x) else ""
            cells.append(f"{np.median(x):.{digits}f}{spread}")
        yield f"| {data} | {method} | {len(seeds)} | " + " | ".join(cells) + " |"


def main(args):
    rows = read_rows(args.runs)
    if not rows:
        print(
            "error: none of the folders has a metrics.csv, which a complete run has",
            file=sys.stderr,
        )
        return 2
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("data", "seed", *next(iter(rows.values()))))
        writer.writerows((data, seed, *row.values()) for (data, _, seed), row in rows.items())
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
