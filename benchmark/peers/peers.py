"""simpo_mujoco.py beside other implementations: speed, and return against wall-clock, in one run.

    python benchmark/peers/peers.py --peers-dir PEERS --out benchmark/peers/peers.csv \
        --programs ours ours-n8 dpmd cleanrl-td3 sbx-sac

Takes at most seeds x programs x --budget-seconds: 2.5 hours a seed with these five at the defaults.
Each program is a script of its own in a Python of its own. They take turns of --slice-seconds on
the whole machine, all others stopped (SIGSTOP), and the clock of each counts its own turns alone,
so that a slow hour of the machine slows them all. All get the same task, seeds and --steps, the
first --starts of them random, and no evaluation; one that has spent its budget is cut off. Hold
ratios of one run against each other, never times of two. Ours and DPMD make one update for each
step of five environments, TD3 and SAC one for each step of a single one; all use batches of 256.

The task itself, peers_env.py, notes steps and returns, for all alike. `return` is the mean
undiscounted return of the last --window training episodes that ended after the random steps, each
program's exploration included: in ours the best of eight samples with noise that falls from 0.5 to
0.2, in DPMD noise of 0.5, which it adapts, in TD3 of 0.1, in SAC samples of the policy. Seconds run
from the start of the program.
Written, for --out FILE.csv:
    FILE.csv        task, method (the program), seed, step, hours, return, for plot.py
    FILE_table.csv  a row for each program, medians over seeds; _ratio is to the first program
      step            last step; the run was cut off if it is below --steps
      steps_per_s     median over stretches of a slice, from 500 steps after the random ones on
      setup_s         seconds to there less 500 / steps_per_s: imports, compilation, random steps,
                      whether a program compiles at its start or at its first update
      total_s, final_return   at the last step
      to_R, trained_R         seconds until `return` first reaches R; the same less setup_s
      python, ...     versions in that program's environment

`bash benchmark/peers/setup.sh PEERS` sets up the environments of the peers: the authors' DPMD,
CleanRL's TD3 in JAX and SBX's SAC. A kill -9 of this script leaves the programs stopped; Ctrl-C
ends them.
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from experiments import FAST, MUJOCO
from results import fail

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
SETTLE, POINTS = 500, 200  # steps of training before the rate counts; rows of a whole curve
# XLA ends a process whose threads wait for each other for 40 s, even if all of it was stopped.
OURS = (
    "env XLA_FLAGS=--xla_cpu_collective_call_terminate_timeout_seconds=1000000 {python} "
    "{root}/simpo_mujoco.py --env-id {env} --seed {seed} --total-timesteps {steps} "
    "--learning-starts {starts} --run-dir {dir}/run --eval-every {steps} --eval-episodes 1"
)
PROGRAMS = {
    "ours": OURS,
    "ours-n8": f"{OURS} {FAST[MUJOCO]}",
    "dpmd": "env WANDB_MODE=disabled {peers}/dpmd/bin/python "
    "{peers}/dpmd-src/scripts/train_mujoco.py --alg dpmd --env {env} --seed {seed} "
    "--start_step {starts} --total_step {train}",
    "cleanrl-td3": "{peers}/cleanrl/bin/python "
    "{peers}/cleanrl-src/cleanrl/td3_continuous_action_jax.py --env-id {env} --seed {seed} "
    "--total-timesteps {steps} --learning-starts {starts}",
    "sbx-sac": "{peers}/sbx/bin/python {root}/benchmark/peers/peers_sbx.py {env} {seed} {steps} "
    "{starts}",
}


# ---- Args -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    programs: tuple[str, ...] = ("ours", "ours-n8")
    """names in PROGRAMS, or NAME=COMMAND; COMMAND may begin with a name to add flags to, else it
    holds {env}, {seed}, {steps}, {starts}, {train} (steps - starts), {dir}, where it runs, {python}
    of this script, {root} of this repository and {peers}"""
    peers_dir: Path = Path("peers")
    """PEERS, see above"""
    env_id: str = "Hopper-v4"
    """the task"""
    steps: int = 100_000
    """environment steps of each program"""
    starts: int = 5_000
    """how many of them are random"""
    seeds: tuple[int, ...] = (1,)
    """seeds, one after the other"""
    slice_seconds: float = 10.0
    """length of a turn"""
    budget_seconds: float = 1800.0
    """own time of a program, for one seed, before it is cut off"""
    window: int = 20
    """episodes that a return is the mean of"""
    target_returns: tuple[float, ...] = (500.0, 1000.0)
    """returns R to reach"""
    run_dir: Path = Path("runs/peers")
    """folder for a folder {program}__{seed} of each run"""
    out: Path = Path("runs/peers.csv")
    """CSV to write, see above"""
    report: bool = False
    """tabulate what --run-dir holds, as far as it got, and run nothing"""

    def __post_init__(self):
        commands(self.programs)
        for ok, rule in (
            (self.programs and self.seeds, "--programs and --seeds must name at least one"),
            (min(self.starts, *self.seeds) >= 0, "--starts and --seeds must be at least 0"),
            (self.steps > self.starts + SETTLE, f"--steps must exceed --starts by over {SETTLE}"),
            (self.slice_seconds > 0, "--slice-seconds must be above 0"),
            (self.budget_seconds > 0, "--budget-seconds must be above 0"),
            (self.window > 0, "--window must be at least 1"),
            (self.out.suffix == ".csv", "--out must end in .csv"),
        ):
            if not ok:
                fail(rule)


def commands(programs):
    """{name: command with its placeholders} of --programs."""
    table = {}
    for program in programs:
        name, _, command = program.partition("=")
        first, _, flags = (command or name).partition(" ")
        if not command and name not in PROGRAMS:
            fail(f"--programs {name} is none of {', '.join(PROGRAMS)} nor NAME=COMMAND")
        table[name] = f"{PROGRAMS.get(first, first)} {flags}"
    return table


# ---- programs in turns ------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """One program with one seed."""

    folder: Path
    command: list[str]
    process: subprocess.Popen | None = None
    own: float = 0.0  # seconds of its turns
    done: bool = False


def create_run(args, name, template, seed):
    """Makes the run's folder and command; refuses a folder that is in use."""
    folder = args.run_dir.absolute() / f"{name}__{seed}"
    values = {"python": sys.executable, "root": ROOT, "peers": args.peers_dir.absolute()}
    values |= {"env": "peers_env:Recorded-v0", "seed": seed, "dir": folder, "starts": args.starts}
    values |= {"steps": args.steps, "train": args.steps - args.starts}
    try:
        command = [part.format(**values) for part in shlex.split(template)]
    except (KeyError, IndexError, ValueError) as error:
        fail(f"--programs {name}: bad command or placeholder {error}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        fail(f"{folder} is not empty; remove it or choose another --run-dir")
    return Run(folder, command)


def launch(args, run):
    """The program as the leader of a process group of its own, its output in log.txt."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path, "PEERS_TASK": args.env_id, "PEERS_DIR": str(run.folder)}
    with (run.folder / "log.txt").open("wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        place = {"cwd": run.folder, "env": os.environ | env, "start_new_session": True}
        return subprocess.Popen(run.command, **streams, **place)


def send(run, *signals):
    """Signals to all processes of a run; one that was not started or is gone does not matter."""
    for signum in signals:
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.killpg(run.process.pid, signum)


def take_turn(args, run):
    """One slice of a program; an error if it died before its last step."""
    start, code = time.monotonic(), None
    if run.process:
        send(run, signal.SIGCONT)
    else:
        run.process = launch(args, run)
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = run.process.wait(min(args.slice_seconds, args.budget_seconds - run.own))
    send(run, signal.SIGSTOP)
    end = time.monotonic()
    run.own += end - start
    with (run.folder / "slices.csv").open("a") as file:
        file.write(f"{start:.4f},{end:.4f}\n")
    step = read_log(run.folder)[1].max(initial=0)
    if code and step < args.steps:
        log = run.folder / "log.txt"
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        fail(f"{run.folder.name} died with {code}, see {log}: {last[:200]}")
    run.done = code is not None or step >= args.steps or run.own >= args.budget_seconds - 0.1
    if run.done:
        print(f"{run.folder.name}: {step:.0f} steps in {run.own:.0f} s", flush=True)
        end_runs([run])


def end_runs(runs):
    """Ends all processes of the runs: asked first, then killed; none stays stopped."""
    for run in runs:
        send(run, signal.SIGTERM, signal.SIGCONT)
    deadline = time.monotonic() + 5
    for run in runs:
        if run.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(deadline - time.monotonic(), 0.1))
            send(run, signal.SIGKILL)
            run.process.wait()


def measure(args):
    """All programs of a seed in turns until each is done, then the next seed."""
    table = commands(args.programs).items()
    for runs in [[create_run(args, *item, seed) for item in table] for seed in args.seeds]:
        try:
            while turns := [run for run in runs if not run.done]:
                for run in turns:
                    take_turn(args, run)
        finally:
            end_runs([run for run in runs if not run.done])


# ---- tables -----------------------------------------------------------------------------------


def read_log(folder):
    """-> time [n], step [n], return [n], in order of time.

    step counts all environments of the program; return is nan but at the end of an episode.
    """
    rows = []
    for path in folder.glob("env-*.csv"):
        before = 0
        for line in path.read_text().splitlines():
            now, step, total = line.split(",")
            rows.append((float(now), int(step) - before, float(total or "nan")))
            before = int(step)
    now, new, total = np.array(sorted(rows, key=lambda row: row[0])).reshape(-1, 3).T
    return now, np.cumsum(new), total


def own_seconds(slices, now):
    """Seconds that a program ran until the times `now`: slices [k, 2] hold their start and end."""
    length = np.diff(slices, axis=1)
    end = np.cumsum(length)[:, None]
    return np.interp(now, slices.ravel(), np.hstack([end - length, end]).ravel())


def training_rate(args, step, seconds):
    """-> seconds to step starts + SETTLE, and environment steps per second from there on.

    The rate is the median over stretches as long as a slice; both are nan if it never got there.
    """
    settled = np.interp(args.starts + SETTLE, step, seconds, right=np.nan)
    if not settled < seconds[-1]:
        return np.nan, np.nan
    stretches = max(int((seconds[-1] - settled) / args.slice_seconds), 1)
    edges = np.linspace(settled, seconds[-1], stretches + 1)
    return settled, np.median(np.diff(np.interp(edges, seconds, step)) / np.diff(edges))


def analyse(args, folder):
    """One run -> {column of the table: value}, curve [k, 3] of step, seconds and return."""
    now, step, total = read_log(folder)
    keep = step <= args.steps
    if not keep.any():
        fail(f"{folder} holds no step: does its command pass {{env}} on?")
    slices = np.loadtxt(folder / "slices.csv", delimiter=",", ndmin=2)
    step, total, seconds = step[keep], total[keep], own_seconds(slices, now[keep])
    settled, rate = training_rate(args, step, seconds)
    setup = settled - SETTLE / rate
    ended = np.flatnonzero(~np.isnan(total) & (step > args.starts))
    sums, k = np.cumsum(np.append(0.0, total[ended])), args.window
    means, ended = (sums[k:] - sums[:-k]) / k, ended[k - 1 :]
    values = {"step": step[-1], "steps_per_s": rate, "setup_s": setup, "total_s": seconds[-1]}
    values["final_return"] = means[-1] if len(means) else np.nan
    for target in args.target_returns:
        first = next(iter(seconds[ended][means >= target]), np.inf)
        values |= {f"to_{target:g}": first, f"trained_{target:g}": first - setup}
    grid = np.arange(args.starts, step[-1] + 1, max(args.steps // POINTS, 1))
    latest = np.searchsorted(step[ended], grid, side="right")
    returns = np.append(np.nan, means)[latest]
    return values, np.stack([grid, np.interp(grid, step, seconds), returns], axis=1)


def tabulate(runs):
    """{program: values of each seed} -> a row of medians for each program, ratios to the first."""
    table = []
    for name, seeds in runs.items():
        row = {"program": name, "seeds": len(seeds)}
        for column in seeds[0]:
            row[column] = np.median([values[column] for values in seeds])
            if column.startswith(("steps_per_s", "to_", "trained_")):
                first = table[0][column] if table else row[column]
                both = np.isfinite([first, row[column]]).all()
                row[f"{column}_ratio"] = row[column] / first if both else np.nan
        table.append(row)
    return table


def text(value):
    """A cell: three digits or more of a number, nothing for one that is not finite."""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.{2 if abs(value) < 100 else 0}f}" if np.isfinite(value) else ""


def write(path, rows):
    """Writes dicts with the columns of all of them."""
    with path.open("w", newline="") as file:
        columns = dict.fromkeys(column for row in rows for column in row)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text(value) for name, value in row.items()} for row in rows)


def report(args):
    """Writes both CSVs and prints the table."""
    curves, runs, versions = {}, {}, {}
    for name, seed in itertools.product(commands(args.programs), args.seeds):
        folder = args.run_dir / f"{name}__{seed}"
        if not args.report or (folder / "slices.csv").exists():
            values, curves[name, seed] = analyse(args, folder)
            runs.setdefault(name, []).append(values)
            versions[name] = json.loads((folder / "versions.json").read_text())
    if not runs:
        fail(f"--run-dir {args.run_dir} has no run of --programs and --seeds")
    table, rows = tabulate(runs), []
    for (name, seed), curve in curves.items():
        for step, seconds, value in curve:
            row = {"task": args.env_id, "method": name, "seed": seed, "step": int(step)}
            rows.append(row | {"hours": f"{seconds / 3600:.5f}", "return": value})
    write(args.out, rows)
    write(args.out.with_stem(f"{args.out.stem}_table"), [x | versions[x["program"]] for x in table])
    for row in [list(table[0]), *(map(text, row.values()) for row in table)]:
        print("| " + " | ".join(row) + " |")


# ---- main -------------------------------------------------------------------------------------


def main():
    """Returns the exit code."""
    for signum in (signal.SIGTERM, signal.SIGHUP):  # so that the programs are ended
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    try:
        args = tyro.cli(Args, description=__doc__)
        if not args.report:
            measure(args)
        report(args)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
