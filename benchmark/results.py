"""Joins run folders into one CSV, a row for each evaluation episode, and one with a row a run.

    python benchmark/results.py runs/table2/* --out runs/table2.csv

Writes table2.csv (task, method, seed, and the columns of the runs' eval.csv; for DNA those of
metrics.csv, whose own "method" becomes "row") and table2.runs.csv (task, method, seed, status,
step, attempts, seconds, device, jax, commit, flags; what only run.py knows is empty for runs that
it did not start). A folder {task}__{method}__{seed} says what it holds; of any other, args.json.
"""

import csv
import io
import json
import os
import sys
from pathlib import Path

import tyro

HEAD = "task", "method", "seed"
TABLES = "eval.csv", "metrics.csv"  # of simpo_mujoco.py and simpo_dmc.py, of simpo_dna.py
PLACE = "run_dir", "resume", "evaluate"  # flags that say where a run is, not what


def fail(message):
    """One line and exit code 2, as from the trainers."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def read_json(path):
    """Content of a JSON file; {} if there is none or it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_atomically(path, text):
    """A reader finds the file of before or this one, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_rows(folder):
    """Rows of a run's table as dicts, less a last line that is just being written."""
    for path in (folder / name for name in TABLES):
        if path.exists():
            text = path.read_text()
            return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return []


def share_done(folder):
    """Share of a run that is done, in [0, 1], by its evaluations; 1 once all of it is there."""
    args, rows = read_json(folder / "args.json"), read_rows(folder)
    if "total_timesteps" not in args:  # DNA, whose table comes last
        last = "pretrained.npz" if args.get("pretrain_only") else "metrics.csv"
        return float(bool(args) and (folder / last).exists())
    share = int(rows[-1]["step"]) / args["total_timesteps"] if rows else 0.0
    return min(share, 0.999 if (folder / "replay.dat").exists() else 1.0)


def task_of(args):
    """Name of a task by the flags of its run."""
    if "env_id" in args:
        return args["env_id"]
    if "domain" in args:
        stock = "" if args["reward"] == "stock" else f"-{args['reward']}"
        return f"{args['domain']}-{args['task']}{stock}"
    return Path(args.get("data") or "generated").name.split(".")[0]


def method_of(args):
    """Name of a weighting by the flags of its run, as in the table of experiments.py."""
    return args["weighting"] + "_neg" * (args["neg_clip"] < 0)


def identify(folder):
    """-> task, method, seed of a run folder, or None for what is no run folder."""
    args, parts = read_json(folder / "args.json"), folder.name.split("__")
    if not args:
        return None
    return parts if len(parts) == 3 else [task_of(args), method_of(args), str(args["seed"])]


def flags_of(args):
    """All flags of a run as text."""
    given = {k: x for k, x in args.items() if k not in PLACE and x is not None and x is not False}
    return " ".join(f"--{k.replace('_', '-')} {x}".removesuffix(" True") for k, x in given.items())


def run_row(folder, rows):
    """What a row of .runs.csv has beside task, method and seed."""
    record = read_json(folder.parent / "logs" / f"{folder.name}.json")
    versions = read_json(folder / "versions.json")
    return {
        "status": "done" if share_done(folder) == 1 else record.get("status", "unfinished"),
        "step": rows[-1].get("step", "") if rows else "",
        "attempts": record.get("attempts", ""),
        "seconds": round(record["seconds"]) if record else "",
        "device": record.get("device", ""),
        "jax": versions.get("jax", ""),
        "commit": versions.get("commit", "")[:7],
        "flags": flags_of(read_json(folder / "args.json")),
    }


def join(folders):
    """-> rows of the CSV and of its .runs.csv, in order of task, method and seed."""
    rows, runs, owner = [], [], {}
    for folder in folders:
        if (name := identify(folder)) is None:
            continue
        if owner.setdefault(tuple(name), folder) != folder:
            fail(f"{folder} and {owner[tuple(name)]} both hold {' '.join(name)}: rename one")
        head, table = dict(zip(HEAD, name, strict=True)), read_rows(folder)
        runs.append(head | run_row(folder, table))
        rows += [head | {"row" if k in HEAD else k: x for k, x in row.items()} for row in table]

    def place(row):  # sorting keeps the order of a run's rows
        return row["task"], row["method"], int(row["seed"])

    return sorted(rows, key=place), sorted(runs, key=place)


def write_results(folders, out):
    """Rebuilds both CSVs; equal folders give equal bytes of the first."""
    for path, rows in zip((out, out.with_suffix(".runs.csv")), join(folders), strict=True):
        columns, text = dict.fromkeys(name for row in rows for name in row), io.StringIO()
        writer = csv.DictWriter(text, columns or HEAD, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path):
    if not any(identify(folder) for folder in runs):
        fail("no run folder among these")
    write_results(runs, out)
    print(f"wrote {out} and {out.with_suffix('.runs.csv')}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
