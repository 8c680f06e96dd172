"""Gathers run folders into a CSV, and prints its returns beside the paper's.

    python -m benchmark.results collect runs/table2/* --out runs/table2.csv
    python -m benchmark.results show runs/table2.csv

`collect` writes table2.csv with a row for each evaluation episode and table2.runs.csv
with a row for each run. A run that table2.csv held before stays until a complete run
of the same task, method and seed takes its place; while it stays, the column `older`
marks it if its commit is none of the folders'.

`show` prints Markdown. A run's value is the mean over the episodes of its last
evaluation; cells are mean +- standard deviation (n - 1) over seeds.
"""

import csv
import json
import math
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event

KEY = ("task", "method", "seed")
NAMES = {  # of the weightings, and of the programs in peers/peers.csv
    "exp": "Exp",
    "linear": "Linear",
    "square": "Square",
    "linear_neg": "Lin. Neg.",
    "square_neg": "Sqr. Neg.",
    "ours": "Linear, N = 32",
    "ours-n8": "Linear",
    "dpmd": "DPMD, authors'",
    "cleanrl-td3": "TD3, CleanRL",
    "sbx-sac": "SAC, SBX",
}
COLOURS = {
    "Exp": "tab:green",
    "Linear": "tab:blue",
    "Square": "tab:purple",
    "Lin. Neg.": "tab:red",
    "Sqr. Neg.": "tab:orange",
    "Linear, N = 32": "tab:cyan",
    "DPMD, authors'": "0.25",
    "TD3, CleanRL": "0.5",
    "SAC, SBX": "0.7",
}
OLDER = ", older trainer"  # ends the name of a run that `collect` marked
PLACE = {"run_dir", "resume", "evaluate"}  # flags that say where a run is, not what
# flags that name no curve: of task, method and seed, or without effect on training
UNNAMED = {
    *("seed", "env_id", "domain", "task", "reward", "weighting", "power", *PLACE),
    *("eval_every", "eval_episodes", "checkpoint_every", "capture_video", "track"),
}
Paths = tyro.conf.Positional[tuple[Path, ...]]


def fail(message):
    """One line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- files ---------------------------------------------------------------------------
def read_table(path):
    """Rows of a CSV as dicts."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeError:
        fail(f"{path} is not UTF-8")
    reader = csv.DictReader(lines, strict=True)
    rows = []
    try:
        columns = reader.fieldnames or ()
        if len(set(columns)) < len(columns):
            fail(f"{path} has two columns of one name")
        for row in reader:
            if None in row or None in row.values():
                fail(f"{path}, line {reader.line_num}: other cells than the header")
            rows.append(row)
    except csv.Error as error:
        fail(f"{path}, line {reader.line_num}: {error}")
    return rows


def write_table(path, rows):
    """Rows with the columns of all of them; a reader finds the old file or this one."""
    columns = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def read_json(path):
    """The dict in a JSON file; {} if there is none or it is not whole."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def read_evaluations(folder, table="eval.csv"):
    """Rows of a run's table with those of `identify`, [] if it has none."""
    path = folder / table
    head = identify(folder)
    return [head | row for row in read_table(path)] if path.exists() else []


def read_published():
    """-> {(source, method): {task: (mean, standard deviation or None)}}."""
    published = {}
    for row in read_table(Path(__file__).parent / "mujoco" / "published.csv"):
        std = float(row["std"]) if row["std"] else None
        tasks = published.setdefault((row["source"], row["method"]), {})
        tasks[row["task"]] = (float(row["mean"]), std)
    return published


PUBLISHED = read_published()
TASKS = list(PUBLISHED["paper", "Linear"])


# ---- run folders ---------------------------------------------------------------------
def task_of(args):
    if "env_id" in args:
        return args["env_id"]
    name = f"{args['domain']}-{args['task']}"
    return name if args["reward"] == "stock" else f"{name}-{args['reward']}"


def method_of(args):
    if args["weighting"] == "power":
        return f"power {args['power']:g}"
    return args["weighting"] + ("_neg" if args["neg_clip"] < 0 else "")


def identify(folder):
    """{task, method, seed} by args.json, but the method by the name of a folder of
    run.py; {} for what is no run folder of simpo_mujoco.py or simpo_dmc.py."""
    args = read_json(folder / "args.json")
    try:
        head = {
            "task": task_of(args),
            "method": method_of(args),
            "seed": args["seed"],
        }
    except KeyError:
        return {}
    parts = folder.name.split("__")
    if len(parts) == 3 and parts[2] == str(args["seed"]):
        head["method"] = parts[1]
    return head


def is_complete(folder):
    """Whether a run of simpo_mujoco.py or simpo_dmc.py made its last evaluation."""
    rows = read_evaluations(folder)
    if not rows or (folder / "replay.dat").exists():
        return False
    last = read_json(folder / "args.json").get("total_timesteps", math.inf)
    return number(folder / "eval.csv", rows[-1], "step") >= last


def hours_of(folder):
    """Hours of work by the TensorBoard files, of which a resumed run has several."""
    seconds = 0.0
    for path in folder.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        start = 0
        times = []
        while start + 12 <= len(data):  # length u64, its crc u32, event, its crc u32
            (length,) = struct.unpack_from("<Q", data, start)
            try:
                event = Event.FromString(data[start + 12 : start + 12 + length])
            except DecodeError:  # killed while it wrote
                break
            if event.wall_time == 0:  # a tail of zeros
                break
            times.append(event.wall_time)
            start += 16 + length
        if times:
            seconds += times[-1] - times[0]
    return round(seconds / 3600, 2) or ""


def flags_of(folder):
    """A run's flags as one would type them."""
    flags = []
    for name, value in read_json(folder / "args.json").items():
        if name not in PLACE and value is not None and value is not False:
            flags.append(f"--{name.replace('_', '-')} {value}".removesuffix(" True"))
    return " ".join(flags)


def describe(folder):
    """The row of .runs.csv."""
    rows = read_evaluations(folder)
    versions = read_json(folder / "versions.json")
    return identify(folder) | {
        "status": "done" if is_complete(folder) else "unfinished",
        "step": rows[-1]["step"] if rows else "",
        "commit": (versions.get("commit") or "")[:7],
        "devices": versions.get("devices", ""),
        "hours": hours_of(folder),
        "jax": versions.get("jax", ""),
        "flags": flags_of(folder),
    }


def collect(runs: Paths, out: Path, table: str = "eval.csv"):
    """Gather run folders into a CSV; others among them are passed over.

    Args:
        runs: run folders of simpo_mujoco.py and simpo_dmc.py
        out: the CSV; beside it OUT.runs.csv
        table: of the run folders, also evaluate.csv
    """
    about_path = out.with_suffix(".runs.csv")
    episodes = {}  # {key: rows}
    about = {}  # {key: row of .runs.csv}
    if out.exists():
        for row in read_table(out):
            episodes.setdefault(key_of(out, row), []).append(row)
        for row in read_table(about_path):
            about[key_of(about_path, row)] = row
        if episodes.keys() - about.keys():
            fail(f"{about_path} lacks runs of {out}")

    folders = {}
    for folder in runs:
        if not folder.exists():
            fail(f"{folder} does not exist")
        head = identify(folder)
        if not head:
            continue
        key = key_of(folder, head)
        if key in folders:
            what = " ".join(map(str, key))
            fail(f"{folder} and {folders[key]} both hold {what}: rename one")
        folders[key] = folder
    if not folders:
        fail("no run folder among these")

    new = {key: describe(folder) for key, folder in folders.items()}
    commits = {row["commit"] for row in new.values()}
    for key, row in about.items():
        for kept in (row, *episodes.get(key, ())):
            kept.pop("older", None)
            if row["commit"] not in commits:
                kept["older"] = "yes"
    for key, row in new.items():
        was_done = key in about and about[key]["status"] == "done"
        if row["status"] == "done" or not was_done:
            about[key] = row
            episodes[key] = read_evaluations(folders[key], table)

    order = sorted(about)
    write_table(out, [row for key in order for row in episodes.get(key, ())])
    write_table(about_path, [about[key] for key in order])
    print(f"wrote {out} and {about_path}")


# ---- curves --------------------------------------------------------------------------
class Run(NamedTuple):
    task: str
    method: str
    seed: int
    flags: dict  # that may differ between runs of a method; {} where they are not known
    x: np.ndarray  # [n], rising
    y: np.ndarray  # [n], mean over the episodes at each x


def number(path, row, column):
    if column not in row:
        fail(f"{path} has no column {column}, but {', '.join(row)}")
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        fail(f"{path}: {column} is {row[column]}, which is no finite number")
    return value


def read_runs(paths, x="step", y="return"):
    """-> [Run] of CSVs that `collect` wrote and of run folders.

    Other folders are passed over, and so are rows without a value of x or y."""
    runs = []
    for path in paths:
        flags = {}  # {key: those that may name a curve}
        if path.is_dir():
            head = identify(path)
            if not head:
                continue
            rows = read_evaluations(path)
            flags[curve_key(path, head)] = parse_flags(flags_of(path))
        else:
            rows = read_table(path)
            about = path.with_suffix(".runs.csv")
            for row in read_table(about) if about.exists() else ():
                flags[curve_key(about, row)] = parse_flags(row["flags"])
        for key, points in read_points(path, rows, x, y).items():
            at = sorted(points)
            means = [np.mean(list(points[value].values())) for value in at]
            runs.append(Run(*key, flags.get(key, {}), np.array(at), np.array(means)))
    if not runs:
        fail(f"no evaluations in {', '.join(map(str, paths)) or 'no files'}")
    return runs


def key_of(path, row):
    """-> task, method, seed."""
    for column in KEY:
        if column not in row:
            fail(f"{path} has no column {column}: see benchmark.results collect")
    seed = number(path, row, "seed")
    if seed % 1:
        fail(f"{path}: seed {seed} is no integer")
    return row["task"], row["method"], int(seed)


def curve_key(path, row):
    """-> task, name of the method, seed."""
    task, method, seed = key_of(path, row)
    name = NAMES.get(method, method)
    name += OLDER if row.get("older") else ""
    return task, name, seed


def parse_flags(text):
    """{name: value} of those flags that may name a curve."""
    flags = {}
    for flag in text.split("--")[1:]:
        name, _, value = flag.strip().partition(" ")
        name = name.replace("-", "_")
        if name not in UNNAMED:
            flags[name] = value
    return flags


def read_points(path, rows, x, y):
    """-> {(task, method, seed): {value of x: {episode: value of y}}}."""
    runs = {}
    for row in rows:
        if "" in (row.get(x), row.get(y)):
            continue
        key = curve_key(path, row)
        episodes = runs.setdefault(key, {}).setdefault(number(path, row, x), {})
        episode = row.get("episode", 0)
        if episode in episodes:
            where = f"{' '.join(map(str, key))}, {x} {row[x]}, episode {episode}"
            fail(f"{path} has two rows for {where}")
        episodes[episode] = number(path, row, y)
    return runs


def group_runs(runs):
    """-> {(task, name): [Run of each seed]}, in the order of Table 2 and of the paper's
    methods. The flags in which runs of a method differ are part of the name."""
    curves = {}
    for run in runs:
        name = run.method
        for flag, value in run.flags.items():
            others = [x.flags for x in runs if x.method == run.method and x.flags]
            if any(flags.get(flag) != value for flags in others):
                name += f", {flag} {value}"
        seeds = curves.setdefault((run.task, name), [])
        if run.seed in [other.seed for other in seeds]:
            fail(f"two runs of {run.task}, {name} have seed {run.seed}")
        seeds.append(run)

    def place(key):
        task, name = key
        return rank(task, TASKS), rank(name.removesuffix(OLDER), [*COLOURS])

    return {key: curves[key] for key in sorted(curves, key=place)}


def rank(name, order):
    return order.index(name) if name in order else len(order)


# ---- tables --------------------------------------------------------------------------
def last_values(runs):
    """-> last step, [value there of each seed that has got as far]."""
    step = max(run.x[-1] for run in runs)
    return int(step), np.array([run.y[-1] for run in runs if run.x[-1] == step])


def text_of(values):
    """Mean +- standard deviation, the latter of several values only."""
    mean = np.mean(values)
    style = ".0f" if abs(mean) >= 20 else ".3g"
    if len(values) == 1:
        return f"{mean:{style}}"
    return f"{mean:{style}} +- {np.std(values, ddof=1):{style}}"


def returns_table(curves, with_published):
    """Lines of Markdown: a row for each published method and each of ours."""
    tasks = list(dict.fromkeys(task for task, _ in curves))
    names = list(dict.fromkeys(name for _, name in curves))
    last = {key: last_values(runs) for key, runs in curves.items()}
    budgets = Counter((step, len(values)) for step, values in last.values())
    usual = budgets.most_common(1)[0][0]

    lines = [["method", "", *(task.removesuffix("-v4") for task in tasks)]]
    lines.append(["---"] * len(lines[0]))
    for (source, method), values in PUBLISHED.items():
        row = [method, source]
        for task in tasks:
            mean, std = values.get(task, (None, None))
            text = "" if mean is None else f"{mean:.0f}"
            row.append(text if std is None else f"{text} +- {std:.0f}")
        if with_published:
            lines.append(row)
    for name in names:
        row = [name, "ours"]
        for task in tasks:
            text = ""
            if (task, name) in last:
                step, values = last[task, name]
                text = text_of(values)
                if (step, len(values)) != usual:
                    text += f" ({step:,} x {len(values)})"
            row.append(text)
        lines.append(row)
    step, seeds = usual
    rule = f"Ours: environment steps x seeds are {step:,} x {seeds}, or as in brackets."
    return [rule, "", *(f"| {' | '.join(row)} |" for row in lines)]


def show(files: Paths, column: str = "return"):
    """Print a table in Markdown, the paper's and others' numbers beside ours.

    Args:
        files: CSVs of `collect`, or run folders
        column: of the CSVs; the published numbers are returns
    """
    curves = group_runs(read_runs(files, y=column))
    in_table2 = column == "return" and any(task in TASKS for task, _ in curves)
    print("\n".join(returns_table(curves, in_table2)))


def main():
    commands = {"collect": collect, "show": show}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    main()
