"""What run folders hold: how far a run is, results.csv and results.runs.csv. Used by run.py."""

import csv
import io
import json
import os
import shlex

from experiments import BANDIT, DMC, DNA, EXPERIMENTS, MUJOCO, Run

RESULTS = {MUJOCO: "eval.csv", DMC: "eval.csv", BANDIT: "curves.csv", DNA: "metrics.csv"}
HEAD = ("experiment", "task", "method", "seed", "setting")


def write_atomically(path, text):
    """A reader finds the file of before or this one, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_json(path):
    """Content of a JSON file; {} if there is none or it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_rows(folder, script):
    """Rows of a run's result file as dicts, less a last line that is just being written."""
    try:
        text = (folder / RESULTS[script]).read_text()
    except OSError:
        return []
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def share_done(folder, script):
    """Share of a run that is done, in [0, 1], by its evaluations; 1 once all results are there."""
    args = read_json(folder / "args.json")
    if script == BANDIT:
        return float(any(folder.glob("figure*.pdf")))
    if script == DNA:
        last = "pretrained.npz" if args.get("pretrain_only") else "metrics.csv"
        return float((folder / last).exists())
    rows = read_rows(folder, script) if args else []
    return min(int(rows[-1]["step"]) / args["total_timesteps"], 1.0) if rows else 0.0


def status(root, run):
    """ "done" or "diverged"; else "unfinished", also where the record of a run that was not
    complete has other flags: the script then sees these beside --resume and refuses them."""
    record = read_json(root / "logs" / f"{run.name}.json")
    if record.get("flags") != list(run.flags):
        return "unfinished"
    missing = record["status"] == "done" and share_done(root / run.name, run.script) < 1
    return "unfinished" if missing else record["status"]


def records(root, experiment):
    """(Run, its record) of every run of an experiment that was started in root, in the order of
    its table, whatever was asked for last."""
    names = [*EXPERIMENTS[experiment].tasks, *EXPERIMENTS[experiment].methods]
    fields, found = Run.__dataclass_fields__, []
    for path in (root / "logs").glob("*.json"):
        record = read_json(path)
        if record.get("experiment") == experiment:
            found.append((Run(**{name: record[name] for name in fields}), record))

    def place(pair):
        run = pair[0]
        order = [names.index(x) if x in names else -1 for x in (run.task, run.method)]
        return order[0], run.task, order[1], int(run.seed.split("-")[0]), run.seed

    return sorted(found, key=place)


def result_rows(root, experiment):
    """Rows of results.csv: HEAD, and what the script's file has beside that."""
    for run, _ in records(root, experiment):
        head = {name: getattr(run, name) for name in HEAD}
        for row in read_rows(root / run.name, run.script):
            if run.script == DNA:  # a run's table also has rows of the peers
                row = {"row": row.pop("method"), **row}
            if run.script == BANDIT:  # its seed takes the place of the range
                del row["landscape"], row["method"]
            yield head | row


def run_rows(root, experiment):
    """Rows of results.runs.csv."""
    for run, record in records(root, experiment):
        rows = read_rows(root / run.name, run.script)
        versions = read_json(root / run.name / "versions.json")
        yield {name: getattr(run, name) for name in HEAD} | {
            "status": record["status"],
            "step": next((rows[-1][x] for x in ("step", "epoch") if rows and x in rows[-1]), ""),
            "attempts": record["attempts"],
            "seconds": round(record["seconds"]),
            "device": record["device"],
            "python": versions.get("python", ""),
            "jax": versions.get("jax", ""),
            "commit": record["commit"],
            "flags": shlex.join(run.flags).replace(f"{root}/", ""),
        }


def write_results(root, experiment, out):
    """Rebuilds both CSVs from the run folders; equal folders give equal bytes of the first."""
    both = (out, result_rows), (out.with_suffix(".runs.csv"), run_rows)
    for path, make in both:
        rows, text = list(make(root, experiment)), io.StringIO()
        writer = csv.DictWriter(text, rows[0] if rows else HEAD, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())
