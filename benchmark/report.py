"""Writes the paper's tables and figures from the CSVs of run.py, the paper's numbers beside ours.

    python benchmark/report.py                              # runs/*/results.csv, not of --smoke
    python benchmark/report.py benchmark/table2_fast.csv --out-dir /tmp/report

Writes report.md and a picture for each experiment and setting. A value is the mean over the
evaluation episodes of a run's last evaluation; cells are mean +- standard deviation (n - 1) over
seeds, curves mean and standard error over seeds, at the steps that all of them have reached. The
interquartile mean is rliable's, over seeds and tasks, with its stratified bootstrap (95 %, seeds
drawn again within each task), of returns divided by the best mean of the paper's Table 2 for that
task; only tasks and seeds that every method has count.
"""

import csv
import dataclasses
import re
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tyro
from experiments import EXPERIMENTS, UsageError, merge
from figure5 import average, plt

BOOTSTRAPS = 10_000
LABELS = {
    "exp": "Exp",
    "linear": "Linear",
    "square": "Square",
    "linear_neg": "Lin. Neg.",
    "square_neg": "Sqr. Neg.",
}
TABLE2 = {  # mean, standard deviation of HalfCheetah, Humanoid, Ant, Walker2d, Hopper, Swimmer
    "TD3": "9820 1543 5263 47 4400 1196 3732 388 3387 302 88 25",
    "SAC": "10257 1057 5298 69 2858 2637 4625 557 2126 1205 85 29",
    "QSM": "12573 1197 2308 468 711 42 3933 185 1594 256 108 37",
    "DIPO": "10136 2525 5184 132 977 20 3809 1112 1191 770 46 3",
    "DACER": "13298 790 3142 2557 4887 646 1871 3131 1813 1781 116 12",
    "QVPO": "8081 701 1375 886 2122 2011 2866 490 960 414 83 36",
    "exp": "13627 704 5100 238 5071 533 4616 145 3002 296 69 16",
    "square": "13276 1095 5068 435 5925 345 4478 1520 2809 954 52 1",
    "linear": "13636 521 5376 154 5984 179 4909 186 2637 370 68 14",
    "linear_neg": "13907 1902 5466 377 5700 230 4906 438 2609 733 66 13",
}
TABLE2 = {name: np.array(row.split(), float).reshape(6, 2) for name, row in TABLE2.items()}
TASKS = tuple(EXPERIMENTS["table2"].tasks)
BEST = dict(zip(TASKS, np.max([row[:, 0] for row in TABLE2.values()], axis=0), strict=True))
TABLE3 = (  # row here, row of the paper, Pred-Activity, improvement
    ("pretrained", "Pretrained", "0.17 +- 0.04", ""),
    ("best-of-n", "", "", ""),
    (None, "CG", "3.30 +- 0.01", ""),
    ("smc", "SMC", "4.15 +- 0.33", ""),
    (None, "TDS", "4.64 +- 0.21", ""),
    (None, "CFG", "5.04 +- 0.06", ""),
    (None, "DRAKES", "6.44 +- 0.04", "-1.2%"),
    (None, "DRAKES-KL", "5.61 +- 0.07", "-13.9%"),
    ("wd1", "WD1", "3.78 +- 0.12", "-42.0%"),
    ("exp", "RL-D2", "6.52 +- 0.03", ""),
    ("linear", "SiMPO-Linear", "6.54 +- 0.01", "+0.3%"),
    ("square", "SiMPO-Square", "6.77 +- 0.03", "+3.8%"),
    ("linear_neg", "SiMPO-Lin. Neg.", "7.51 +- 0.08", "+15.2%"),
    ("square_neg", "SiMPO-Sqr. Neg.", "7.62 +- 0.08", "+16.9%"),
)
ESCAPED = 0.15  # regret: half of the difference of the optima of `escape`, as in simpo_bandit.py


@dataclasses.dataclass(frozen=True)
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """CSVs of run.py, each with its .runs.csv beside it; default runs/*/results.csv"""
    out_dir: Path = Path("benchmark/report")
    """folder of report.md and the pictures"""


# ---- reading ----------------------------------------------------------------------------------


def read_csv(path):
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: {reason}; benchmark/run.py writes it") from None


def read(files):
    """{(experiment, setting): (rows, rows of .runs.csv)} of all files."""
    found, owner = defaultdict(lambda: ([], [])), {}
    for path in files:
        rows, runs = read_csv(path), read_csv(path.with_suffix(".runs.csv"))
        for row in (*rows[:1], *runs):
            if row.get("experiment") not in EXPERIMENTS or not row.get("setting"):
                raise UsageError(f"{path} is not written by benchmark/run.py")
        for run in runs:
            name = tuple(list(run.values())[:5])
            if owner.setdefault(name, path) != path:
                raise UsageError(f"{path} repeats a run of {owner[name]}: {' '.join(name)}")
            found[run["experiment"], run["setting"]][1].append(run)
        for row in rows:
            found[row["experiment"], row["setting"]][0].append(row)
    return found


def curves(rows, column, at):
    """{(task, method): {seed: {step: mean over episodes}}}; `at` is the column of steps."""
    values = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        seeds = values[row["task"], row["method"]]
        seeds[int(row["seed"])][int(row[at])].append(float(row[column]))
    return {
        key: {seed: {x: np.mean(y) for x, y in steps.items()} for seed, steps in seeds.items()}
        for key, seeds in values.items()
    }


def last(seeds):
    """{seed: {step: value}} -> the last step that any seed has, {seed: value} of those with it."""
    step = max(max(steps) for steps in seeds.values())
    return step, {seed: steps[step] for seed, steps in seeds.items() if step in steps}


# ---- tables -----------------------------------------------------------------------------------


def mean_std(values, digits=0):
    """Text "mean +- std"; the mean alone of one value."""
    std = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{std}"


def cells(values, keys):
    """-> texts of our results, with steps and number of seeds in brackets where these are not the
    usual ones; a sentence that names the usual ones."""
    found = {key: last(values[key]) for key in keys if key in values}
    budgets = Counter((step, len(seeds)) for step, seeds in found.values())
    usual = max(budgets, key=budgets.get, default=(0, 0))
    texts = dict.fromkeys(keys, "not run")
    for key, (step, seeds) in found.items():
        x = list(seeds.values())
        budget = "" if (step, len(x)) == usual else f" ({step:,} x {len(x)})"
        texts[key] = mean_std(x, 0 if abs(np.mean(x)) >= 20 else 3) + budget
    what = "environment steps x seeds"
    return texts, f"Here {usual[0]:,} x {usual[1]} {what}; brackets say where it is not."


def markdown(header, rows):
    """Lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines] + [""]


def comparable(values, methods):
    """-> the last step of any run; the tasks and seeds with results of every method there."""
    lasts = {(t, m): last(values[t, m]) for t, m in values if t in TASKS and m in methods}
    step = max((step for step, _ in lasts.values()), default=0)
    there = {key: set(seeds) for key, (at, seeds) in lasts.items() if at == step}
    tasks = [t for t in TASKS if all((t, m) in there for m in methods)]
    seeds = [there[t, m] for t in tasks for m in methods]
    return step, tasks, sorted(set.intersection(*seeds)) if seeds else []


def iqm_table(values, methods):
    """Lines: interquartile mean and interval of each method, over what all methods have."""
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r benchmark/requirements.txt") from None
    methods = [m for m in methods if any(method == m for _, method in values)]
    step, tasks, seeds = comparable(values, methods)
    if not seeds:
        return ["No interquartile mean: no task that all methods have, at equal steps.", ""]
    scores = {
        m: np.array([[values[t, m][seed][step] / BEST[t] for t in tasks] for seed in seeds])
        for m in methods
    }
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # random_state's name
        points, intervals = library.get_interval_estimates(
            scores,
            lambda x: np.array([metrics.aggregate_iqm(x), metrics.aggregate_mean(x)]),
            reps=BOOTSTRAPS,
            random_state=np.random.RandomState(0),
        )
    rows = []
    for m in methods:
        low, high = intervals[m]
        texts = [
            f"{x:.3f} ({a:.3f} to {b:.3f})" if len(seeds) > 1 else f"{x:.3f}"
            for x, a, b in zip(points[m], low, high, strict=True)
        ]
        paper = ""
        if m in TABLE2:
            paper = np.mean([TABLE2[m][TASKS.index(t), 0] / BEST[t] for t in tasks])
            paper = f"{paper:.3f}"
        rows.append([LABELS.get(m, m), *texts, paper])
    what = f"Normalised returns: {', '.join(tasks)}; {step:,} steps, seeds: {len(seeds)}."
    header = ["method", "interquartile mean (95 %)", "mean (95 %)", "mean, paper"]
    return [what, "", *markdown(header, rows)]


def table2(rows):
    values, lines = curves(rows, "return", "step"), []
    ours = [(task, method) for method in TABLE2 if method in LABELS for task in TASKS]
    texts, budget = cells(values, ours)
    for method, paper in TABLE2.items():
        name = f"SiMPO-{LABELS[method]}" if method in LABELS else method
        lines.append([name, "paper", *(f"{m:.0f} +- {s:.0f}" for m, s in paper)])
        if method in LABELS:
            lines.append([name, "here", *(texts[task, method] for task in TASKS)])
    head = [f"The paper's cells: 1,000,000 x 5. {budget}", ""]
    header = ["method", "", *(task.removesuffix("-v4") for task in TASKS)]
    return head + markdown(header, lines) + iqm_table(values, EXPERIMENTS["table2"].methods)


def returns_table(rows, experiment):
    """Ours alone: the paper has a picture, or nothing."""
    _, _, tasks, methods = EXPERIMENTS[experiment]
    values = curves(rows, "return", "step")
    texts, budget = cells(values, [(task, method) for method in methods for task in tasks])
    lines = [[LABELS.get(m, m), *(texts[task, m] for task in tasks)] for m in methods]
    paper = "has nothing" if experiment == "ablation" else "shows curves, no numbers"
    head = [f"The paper {paper}. {budget}", ""]
    lines = head + markdown(["method", *tasks], lines)
    return lines + (iqm_table(values, methods) if experiment == "figure6" else [])


def regret_table(rows, experiment):
    _, _, tasks, methods = EXPERIMENTS[experiment]
    values, lines = curves(rows, "regret", "epoch"), []
    for task in tasks:
        for method in methods:
            if (task, method) not in values:
                lines.append([task, LABELS[method], "not run", *[""] * (4 - (task != "escape"))])
                continue
            _, mean, error, n = average(values[task, method])
            epochs, final = last(values[task, method])
            whole = [np.mean(list(steps.values())) for steps in values[task, method].values()]
            texts = [f"{mean[-1]:.4f} +- {error[-1]:.4f}"]
            texts += [f"{np.mean(whole):.4f} +- {np.std(whole, ddof=1) / np.sqrt(n):.4f}"]
            if task == "escape":
                texts.append(f"{np.mean([x < ESCAPED for x in final.values()]):.0%}")
            lines.append([task, LABELS[method], n, epochs, *texts])
    header = ["reward", "method", "seeds", "epochs", "final regret", "mean regret"]
    header += ["at the best optimum"] if "escape" in tasks else []
    head = ["The paper shows curves, no numbers. +- is the standard error over seeds.", ""]
    return head + markdown(header, lines)


def table3(rows):
    """A table for each data set: ours is the held-out oracle's score, and what it was paid with."""
    lines = []
    for data in dict.fromkeys(row["task"] for row in rows):
        found = {}  # the same pretrained model is in the table of every method: taken once
        for row in (row for row in rows if row["task"] == data):
            name = row["method"] if row["row"].startswith("simpo-") else row["row"]
            found.setdefault(name, {}).setdefault(row["seed"], row)
        values = {
            name: {x: [float(row[x]) for row in seeds.values()] for x in ("eval", "ft", "log_lik")}
            for name, seeds in found.items()
        }
        base, table = np.mean(values["exp"]["eval"]) if "exp" in values else None, []
        for ours, name, activity, gain in TABLE3:
            here = ["not run"] + [""] * 4
            if ours in values:
                x, rate = values[ours], ""
                if base and base > 0 and gain:
                    rate = f"{np.mean(x['eval']) / base - 1:+.1%}"
                here = [mean_std(x["eval"], 2), rate, mean_std(x["ft"], 2)]
                here += [mean_std(x["log_lik"], 1), len(x["eval"])]
            table.append([name or ours, activity, gain, *here])
        header = ["method", "Pred-Activity, paper", "Improv., paper", f"here, {data}", "Improv."]
        lines += markdown([*header, "ft oracle", "log-likelihood", "seeds"], table)
    head = "Here the oracle and the data are others than the paper's, unless the flags below name"
    head += " them: the order can be compared, the scores cannot. RL-D2 is SiMPO-Exp."
    return [head, "", *lines]


def hardware(runs):
    """Lines: which runs there are, on what and how long."""
    count = Counter(run["status"] for run in runs)
    lines = [f"* runs: {', '.join(f'{n} {status}' for status, n in sorted(count.items()))}"]
    for run in runs:
        if run["status"] == "diverged":
            name = f"{run['task']}, {run['method']}, seed {run['seed']}"
            lines.append(f"* diverged, and left out of means at later steps: {name}")
    for name in ("device", "python", "jax", "commit"):
        lines.append(f"* {name}: {', '.join(sorted({run[name] for run in runs}))}")
    flags = [merge(run["flags"]) for run in runs if run["method"] != "pretraining"] or [{}]
    common = [x for x in flags[0] if all(y.get(x) == flags[0][x] for y in flags) and x != "--seed"]
    common = " ".join(" ".join((name, *flags[0][name])) for name in common)
    lines.append(f"* flags of all runs: {common or 'none'}")
    hours = [float(run["seconds"]) / 3600 for run in runs]
    lines.append(f"* hours: {sum(hours):.1f} in all, {max(hours, default=0):.2f} the longest run")
    return [*lines, ""]


# ---- figures ----------------------------------------------------------------------------------


def draw(rows, experiment, column, at, path):
    """A panel for each task that has runs, a curve for each method."""
    _, _, tasks, methods = EXPERIMENTS[experiment]
    values = curves(rows, column, at)
    tasks = [task for task in tasks if any((task, method) in values for method in methods)]
    width = min(len(tasks), 3)
    height = -(-len(tasks) // width)
    figure, axes = plt.subplots(
        height, width, figsize=(4.2 * width, 3.2 * height), squeeze=False, layout="tight"
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes.flat, tasks, strict=False):
        for i, method in enumerate(methods):
            if (task, method) in values:
                seeds = values[task, method]
                _, whole = last(seeds)  # those that the table has
                steps, mean, error, n = average({seed: seeds[seed] for seed in whole})
                axis.plot(steps, mean, color=f"C{i}", label=f"{LABELS.get(method, method)} ({n})")
                band = mean - error, mean + error
                axis.fill_between(steps, *band, color=f"C{i}", alpha=0.2, lw=0)
        axis.set(title=task, xlabel="environment steps" if at == "step" else at, ylabel=column)
        axis.legend(frameon=False, fontsize=8, title="method (seeds)", title_fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---- main -------------------------------------------------------------------------------------


def title(experiment):
    """As the paper has it: "Table 2" for table2."""
    return re.sub(r"(\d)", r" \1", experiment).capitalize()


def section(experiment, setting, rows, runs, out_dir):
    """Lines of one experiment in one setting, and its picture."""
    name = experiment if setting == "default" else f"{experiment}-{setting}"
    lines = [f"## {title(experiment)}, {setting} setting", ""]
    if not rows:
        return [*lines, "No evaluation yet.", "", *hardware(runs)]
    bandit = "regret" in rows[0]
    if experiment == "table2":
        lines += table2(rows)
    elif experiment == "table3":
        lines += table3(rows)
    else:
        lines += (regret_table if bandit else returns_table)(rows, experiment)
    if experiment != "table3":
        columns = ("regret", "epoch") if bandit else ("return", "step")
        draw(rows, experiment, *columns, out_dir / f"{name}.png")
        lines += [f"![{title(experiment)}]({name}.png)", ""]
    return lines + hardware(runs)


def main(args):
    files = args.files or tuple(
        path for path in sorted(Path("runs").glob("*/results.csv")) if "-smoke" not in str(path)
    )
    if not files:
        raise UsageError("no runs/*/results.csv here; benchmark/run.py writes them")
    found = read(files)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    lines = ["# The paper's tables and figures", "", "Made by `python benchmark/report.py`.", ""]
    for experiment in EXPERIMENTS:
        settings = [s for e, s in found if e == experiment]
        if not settings:
            lines += [f"## {title(experiment)}", "", "Not run.", ""]
        for setting in settings:
            lines += section(experiment, setting, *found[experiment, setting], args.out_dir)
    (args.out_dir / "report.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {args.out_dir / 'report.md'}")


if __name__ == "__main__":
    from run import parse_flags

    try:
        main(parse_flags(Args, sys.argv[1:]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
