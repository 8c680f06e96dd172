"""Draws learning curves from run folders, or from CSVs of results.py and run.py.

    python benchmark/plot.py runs/*                        # -> runs/plot.png and runs/plot.pdf
    python benchmark/plot.py runs/* --x hours --y losses/q
    python benchmark/plot.py benchmark/mujoco/table2.csv --paper --out benchmark/mujoco/table2

A panel for each task, a curve for each set of flags but the seed, named after those in which the
runs differ. A run's value at a step is the mean over the episodes of an evaluation; a curve is the
mean over seeds, as far as all of them are, its band their 95 % bootstrap interval. --paper adds
Table 2's value after 1M steps of each method, dashed in its colour, and TD3's in grey.
"""

import csv
import json
import struct
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import tyro
from matplotlib.lines import Line2D
from paper import COLOURS, NAMES, OTHERS, TABLE2, TASKS
from results import PLACE, fail, method_of, read_json, read_rows, task_of
from scipy.stats import bootstrap
from tensorboardX.proto.event_pb2 import Event

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# flags that do not tell a curve: of the task and the seed, and what changes no result
APART = {"seed", "env_id", "domain", "task", "reward", "capture_video", "track", *PLACE}
APART |= {"eval_every", "eval_episodes", "checkpoint_every"}
STYLES = ("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders or CSVs; others are passed over
    y: str = "return"  # column of eval.csv, or of run folders a TensorBoard tag, as losses/q
    x: Literal["steps", "hours"] = "steps"  # hours of wall-clock, of run folders or a column
    paper: bool = False  # add the paper's values and TD3's
    out: Path = Path("runs/plot")  # the figure without its suffix; .png and .pdf are written


class Run(NamedTuple):
    task: str
    name: str  # of the weighting
    flags: dict  # the others
    seed: int
    x: np.ndarray
    y: np.ndarray


# ---- reading -----------------------------------------------------------------------------------


def read_events(folder):
    """TensorBoard's events -> {tag: {step: value}}, seconds of work [n], steps [n] then.

    A resumed run has a file for each attempt; the time between two attempts is not work.
    """
    tags, seconds, steps, before = defaultdict(dict), [], [], 0.0
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at, first, now = path.read_bytes(), 0, None, 0.0
        while at + 12 <= len(data):  # a record: length u64, its crc u32, payload, crc u32
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):  # killed while it wrote
                break
            event = Event.FromString(data[at + 12 : at + 12 + length])
            first = event.wall_time if first is None else first
            now = event.wall_time - first
            for value in event.summary.value:
                tags[value.tag][event.step] = value.simple_value
            if event.summary.value and event.step > (steps[-1] if steps else 0):
                seconds.append(before + now)
                steps.append(event.step)
            at += 16 + length
        before += now
    return tags, np.array(seconds), np.array(steps)


def means(rows, column, x="step"):
    """Rows of eval.csv -> x [n], means [n] over the episodes of each; empty cells are left out."""
    values = defaultdict(list)
    for row in rows:
        for flag, name in ("--y", column), ("--x", x):
            if name not in row:
                fail(f"{flag} {name} is none of {', '.join(row)}")
        if row[column]:
            values[float(row[x])].append(float(row[column]))
    return np.array(list(values)), np.array([np.mean(x) for x in values.values()])


def read_folder(args, folder):
    flags, rows = read_json(folder / "args.json"), read_rows(folder)
    if not flags or not rows or "step" not in rows[0]:
        return []
    tags, seconds, steps = read_events(folder) if args.x == "hours" or "/" in args.y else [{}] * 3
    if "/" in args.y:
        if args.y not in tags:
            fail(f"--y {args.y} is none of {', '.join(sorted(tags))} in {folder}")
        x, y = (np.array(list(values)) for values in (tags[args.y], tags[args.y].values()))
    else:
        x, y = means(rows, args.y)
    if args.x == "hours":
        if not len(steps):
            fail(f"{folder} has no TensorBoard log, which --x hours reads")
        x = np.interp(x, steps, seconds) / 3600
    method = method_of(flags)
    if flags["weighting"] == "power":
        method += f", p = {flags['power']:g}"
    rest = {k: v for k, v in flags.items() if k not in APART | {"weighting", "power"}}
    return [Run(task_of(flags), NAMES.get(method, method), rest, flags["seed"], x, y)]


def read_csv(args, path):
    runs, x = defaultdict(list), args.x.removesuffix("s") if args.x == "steps" else args.x
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not {"task", "method", "seed", "step"} <= row.keys():
                fail(f"{path} has no learning curves; results.py and run.py write such")
            runs[row["task"], row["method"], int(row["seed"])].append(row)
    return [
        Run(task, NAMES.get(method, method), {}, seed, *means(rows, args.y, x))
        for (task, method, seed), rows in runs.items()
    ]


# ---- curves ------------------------------------------------------------------------------------


def label(runs):
    """{(name, label): runs}: curves, named after the flags in which the runs differ. A clip
    differs only between runs of one name: Linear and Lin. Neg. say it themselves."""
    clips = defaultdict(set)
    for run in runs:
        clips[run.name].add(run.flags.get("neg_clip"))
    names = {name for run in runs for name in run.flags}
    values = {k: {json.dumps(x.flags[k]) for x in runs if k in x.flags} for k in names}
    differ = sorted(k for k in names if len(values[k]) > 1 and k != "neg_clip")
    curves = defaultdict(list)
    for run in runs:
        shown = differ + ["neg_clip"] * (len(clips[run.name]) > 1)
        rest = ", ".join(f"{k} {run.flags[k]}" for k in shown if k in run.flags)
        curves[run.name, rest].append(run)
    return curves


def average(runs, hours=False):
    """Runs of one curve -> x [n] that all have reached, mean [n], bounds [n] of the 95 % interval
    (of one seed equal to the mean)."""
    end = min(run.x[-1] for run in runs)
    longest = max(runs, key=lambda run: len(run.x)).x
    x = np.linspace(max(run.x[0] for run in runs), end, 200) if hours else longest[longest <= end]
    y = np.stack([np.interp(x, run.x, run.y) for run in runs])
    if len(runs) == 1:
        return x, y[0], y[0], y[0]
    both = bootstrap((y,), np.mean, method="percentile", n_resamples=2000, rng=0)
    return x, y.mean(axis=0), *both.confidence_interval


def styles(curves):
    """{(name, rest): (colour, line style, label)}: the name has a colour, the rest a style, or if
    all have one name the rest has a colour."""
    names, rests = (list(dict.fromkeys(x)) for x in zip(*sorted(curves), strict=True))
    free, found = cycle(OTHERS), {}
    alone = len(names) == 1 and len(rests) > 1
    colours = {x: COLOURS.get(x) or next(free) for x in (rests if alone else names)}
    order = [*COLOURS, *names]
    for name, rest in sorted(curves, key=lambda x: (order.index(x[0]), x[1])):
        style = "-" if alone else STYLES[rests.index(rest) % len(STYLES)]
        text = ", ".join(filter(None, (name, rest))) if len(names) > 1 else rest or name
        found[name, rest] = colours[rest if alone else name], style, text
    return found


# ---- figure ------------------------------------------------------------------------------------


def draw_paper(axis, task, names):
    if task not in TASKS:
        return
    for name in ("TD3", *(name for name in names if name in TABLE2)):
        value = TABLE2[name][TASKS.index(task), 0]
        axis.axhline(value, color=COLOURS.get(name, "grey"), ls="--", lw=1)


def draw(args, runs):
    curves = label(runs)
    look, tasks = styles(curves), list(dict.fromkeys(run.task for run in runs))
    tasks.sort(key=lambda x: TASKS.index(x) if x in TASKS else len(TASKS))
    width = min(len(tasks), 3)
    height = -(-len(tasks) // width)
    size = max(3.6 * width, 4.8), 2.7 * height + 0.7
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    handles, seeds = {}, defaultdict(set)
    for axis, task in zip(axes.flat, tasks, strict=False):
        there = [key for key in look if any(run.task == task for run in curves[key])]
        for key in there:
            group = [run for run in curves[key] if run.task == task]
            if len({run.seed for run in group}) < len(group):
                fail(f"two runs of {task}, {look[key][2] or key[0]} have one seed")
            x, mean, low, high = average(group, args.x == "hours")
            colour, style, _ = look[key]
            (handles[key],) = axis.plot(x, mean, color=colour, ls=style, lw=1.4)
            if len(group) > 1:
                axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            seeds[key].add(len(group))
        if args.paper:
            draw_paper(axis, task, {name for name, _ in there})
        axis.set_title(task, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("environment steps" if args.x == "steps" else "hours of work")
        if args.x == "steps":
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    figure.supylabel(args.y, fontsize=10)
    texts = [f"{look[key][2]} ({'/'.join(map(str, sorted(seeds[key])))})" for key in handles]
    lines = list(handles.values())
    if args.paper:
        lines += [Line2D([], [], color=colour, ls="--", lw=1) for colour in ("black", "grey")]
        texts += ["the paper's value after 1M steps, in colour", "TD3's, from the paper"]
    several = any(n > 1 for counts in seeds.values() for n in counts)
    title = "seeds in brackets" + ", bands: 95 % bootstrap interval of their mean" * several
    texts = [textwrap.fill(text, int(14 * size[0])) for text in texts]
    columns = max(int(13 * size[0]) // (max(map(len, texts)) + 8), 1)
    place = {"loc": "outside lower center", "ncols": min(len(lines), columns)}
    figure.legend(lines, texts, title=title, fontsize=8, title_fontsize=8, frameon=False, **place)
    return figure


def main(args):
    runs, parents = [], {path.parent for path in args.runs if path.is_dir()}
    for path in args.runs:
        if path.suffix == ".csv" and path.parent not in parents:  # else it repeats the folders
            runs += read_csv(args, path)
        elif path.is_dir():
            runs += read_folder(args, path)
    if not runs:
        fail("no evaluations in " + (", ".join(map(str, args.runs[:3])) or "no runs"))
    figure = draw(args, runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        path = args.out.with_name(args.out.name + suffix)
        figure.savefig(path, dpi=110)
        print(f"wrote {path}")
    plt.close(figure)


def cli(argv=None):
    try:
        main(tyro.cli(Args, args=argv, description=__doc__))
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    cli()
