"""Prints tables in Markdown from CSVs of run.py or results.py, the paper's numbers beside ours.

    python benchmark/report.py benchmark/mujoco/table2.csv

A run's value is the mean over the episodes of its last evaluation; cells are mean +- standard
deviation (n - 1) over seeds. Where tasks of Table 2 are among them, a second table has the
interquartile mean and the mean over seeds and tasks of the returns divided by the best mean of the
paper's table for that task, with 95 % stratified bootstrap intervals (seeds drawn again within each
task; Agarwal et al., 2108.13264). There only tasks count on which all methods have got as far.
"""

import csv
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from paper import BEST, NAMES, SIMBAV2, TABLE2, TASKS
from results import fail
from scipy.stats import bootstrap, trim_mean


@dataclass(frozen=True)
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]  # CSVs
    column: str = "return"  # of the CSVs


def read(files, column):
    """{(task, method): {seed: (last step, mean over its episodes)}} of all files."""
    episodes, last = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if not {"task", "method", "seed", "step", column} <= row.keys():
                    fail(f"{path} has no {column}; benchmark/results.py and run.py write such CSVs")
                key = row["task"], NAMES.get(row["method"], row["method"]), int(row["seed"])
                episodes[key][int(row["step"])].append(float(row[column]))
    for (task, method, seed), steps in episodes.items():
        step = max(steps)
        last[task, method][seed] = step, np.mean(steps[step])
    return last


# ---- tables ------------------------------------------------------------------------------------


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines] + [""]


def cells(last):
    """-> {(task, method): text}, with steps and number of seeds in brackets where these are not the
    usual ones; the sentence that names the usual ones. Of a cell the seeds at its last step count.
    """
    found = {}
    for key, seeds in last.items():
        step = max(at for at, _ in seeds.values())
        found[key] = step, [value for at, value in seeds.values() if at == step]
    usual, _ = Counter((step, len(x)) for step, x in found.values()).most_common(1)[0]
    texts = {}
    for key, (step, x) in found.items():
        digits = 0 if abs(np.mean(x)) >= 20 else 2
        std = f" +- {np.std(x, ddof=1):.{digits}f}" if len(x) > 1 else ""
        budget = "" if (step, len(x)) == usual else f" ({step:,} x {len(x)})"
        texts[key] = f"{np.mean(x):.{digits}f}{std}{budget}"
    rule = "brackets have others, as steps x seeds"
    return texts, f"Here {usual[0]:,} environment steps and {usual[1]} seed(s); {rule}."


def returns_table(last, tasks, methods):
    """Ours, and where the tasks are Table 2's the rows of the paper and of SimbaV2."""
    texts, budget = cells(last)
    paper, lines = set(tasks) & set(TASKS), []
    head = [f"{budget} The paper has 1,000,000 and 5." if paper else budget, ""]
    for method in [*TABLE2, *SIMBAV2] if paper else []:
        numbers = TABLE2.get(method, SIMBAV2.get(method))
        row = [numbers[TASKS.index(task)] if task in TASKS else None for task in tasks]
        row = [
            " +- ".join(f"{x:.0f}" for x in np.atleast_1d(x)) if x is not None else "" for x in row
        ]
        lines.append([method, "paper" if method in TABLE2 else "published", *row])
        if method in methods:
            lines.append([method, "here", *(texts.get((task, method), "") for task in tasks)])
    for method in (x for x in methods if not paper or x not in TABLE2):
        lines.append([method, "here", *(texts.get((task, method), "") for task in tasks)])
    return head + markdown(["method", "", *(x.removesuffix("-v4") for x in tasks)], lines)


def iqm(x, axis=None):
    """Interquartile mean: of the middle half of the values."""
    return trim_mean(x, 0.25, axis=axis)


def with_interval(scores, statistic):
    """scores: an array [seeds] for each task -> text of the statistic over all of them, and of its
    stratified interval where every task has several seeds."""
    point = f"{statistic(np.concatenate(scores)):.3f}"
    if min(map(len, scores)) < 2:
        return point

    def joined(*tasks, axis):
        return statistic(np.concatenate(tasks, axis=axis), axis=axis)

    both = bootstrap(scores, joined, method="percentile", n_resamples=10_000, rng=0)
    return "{} ({:.3f} to {:.3f})".format(point, *both.confidence_interval)


def iqm_table(last, methods):
    step = max(at for (task, _), x in last.items() if task in TASKS for at, _ in x.values())
    scores = {
        (task, method): np.array([y for at, y in seeds.values() if at == step]) / BEST[task]
        for (task, method), seeds in last.items()
        if task in TASKS
    }
    there = [t for t in TASKS if all(np.size(scores.get((t, m), ())) for m in methods)]
    if not there:
        return ["No interquartile mean: no task on which all methods have got as far.", ""]
    rows = []
    for method in methods:
        x = [scores[task, method] for task in there]
        paper = ""
        if method in TABLE2:
            paper = np.mean([TABLE2[method][TASKS.index(t), 0] / BEST[t] for t in there])
            paper = f"{paper:.3f}"
        rows.append([method, with_interval(x, iqm), with_interval(x, np.mean), paper])
    what = f"Normalised returns after {step:,} steps: {', '.join(there)}."
    header = ["method", "interquartile mean (95 %)", "mean (95 %)", "mean, paper"]
    return [what, "", *markdown(header, rows)]


def report(last):
    """Lines of Markdown."""
    order = [*TABLE2, *NAMES.values()]
    tasks = list(dict.fromkeys(task for task, _ in last))
    tasks.sort(key=lambda x: TASKS.index(x) if x in TASKS else len(TASKS))
    methods = list(dict.fromkeys(method for _, method in last))
    methods.sort(key=lambda x: order.index(x) if x in order else len(order))
    lines = returns_table(last, tasks, methods)
    return lines + (iqm_table(last, methods) if set(tasks) & set(TASKS) else [])


def main(args):
    if not (last := read(args.files, args.column)):
        fail("no evaluations in these files")
    print("\n".join(report(last)).rstrip())


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:
        fail(error)
