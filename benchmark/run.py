"""Runs the experiments behind the paper's tables and figures through Ray; survives being killed.

    python benchmark/run.py table2                  # six tasks, four weightings, five seeds
    python benchmark/run.py figure6 --fast --tasks Hopper-v4 --seeds 1 2
    python benchmark/run.py table3 --smoke          # some minutes, to check the plumbing
    python benchmark/run.py table2 --gpus-per-run 0.25 --address auto
    python benchmark/run.py table3 -- --data sites.csv.gz --drop-bad-rows

Each run is one of the public scripts, as --dry-run prints it, in {root}/{task}__{method}__{seed};
what follows -- goes to all of them. The same command again goes on: complete runs are skipped,
begun ones resumed. A run whose worker or machine is lost is resumed on another; Ctrl-C saves
checkpoints first. A run that diverged is not repeated until its logs/NAME.json and its folder are
removed. Exit code: 0 all complete, 1 not all, 2 wrong flags, 128 + signal when stopped.

Writes results.csv, a row for each run and evaluation episode (for the bandit epoch, for DNA row of
metrics.csv), and results.runs.csv, a row for each run: status, attempts, seconds, device. In
{root}/logs are log and record of each run. On several machines this repository and its Python must
have the same path on all of them, and --root must lie on a file system that they share.
"""

import contextlib
import dataclasses
import fcntl
import io
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro
from attempt import ROOT, attempt
from experiments import BANDIT, DMC, EXPERIMENTS, MUJOCO, UsageError, plan
from guard import is_free
from results import read_json, share_done, status, write_results
from tqdm import tqdm

STOP_WITHIN = 120  # seconds for the scripts to save and end on Ctrl-C


@dataclasses.dataclass(frozen=True)
class Args:
    experiment: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]
    """table or figure of the paper, or the ablation of what it leaves open"""
    fast: bool = False
    """the fast setting, FAST in experiments.py"""
    smoke: bool = False
    """tiny networks and budgets, one seed: some minutes"""
    tasks: tuple[str, ...] = ()
    """these tasks alone"""
    methods: tuple[str, ...] = ()
    """these methods alone"""
    seeds: tuple[int, ...] = ()
    """seeds; default 1 to 5, for table3 and ablation 1 to 3, for figure2 and figure3 1 to 20"""
    total_timesteps: int | None = None
    """environment steps of a run, with 20 evaluations and 40 checkpoints; default the script's"""
    root: Path | None = None
    """folder of the run folders; default runs/{experiment}, with -fast or -smoke behind it"""
    out: Path | None = None
    """the CSV to write; default {root}/results.csv"""
    address: str | None = None
    """running Ray cluster (auto, or HOST:PORT); default this machine alone"""
    cpus_per_run: int = 1
    """cores of a run; without GPU also XLA devices, whose number changes the last digits"""
    gpus_per_run: float = 0.0
    """GPUs of a run; 0.25 packs four runs on a card, each with a quarter of its memory"""
    max_retries: int = 5
    """attempts after the first at a run that was lost or failed"""
    dry_run: bool = False
    """print the commands and stop"""

    def __post_init__(self):
        script, _, tasks, methods = EXPERIMENTS[self.experiment]
        steps, seeds, gpus = self.total_timesteps, self.seeds, self.gpus_per_run
        has_budget = script in (MUJOCO, DMC) and self.experiment != "ablation"
        in_a_row = all(b - a == 1 for a, b in zip(seeds, seeds[1:], strict=False))
        for name, ok, rule in (
            ("smoke", not (self.smoke and self.fast), "left out with --fast"),
            ("tasks", set(self.tasks) <= set(tasks), f"among {', '.join(tasks)}"),
            ("methods", set(self.methods) <= set(methods), f"among {', '.join(methods)}"),
            ("seeds", all(0 <= x < 2**32 for x in seeds), "in [0, 2^32)"),
            ("seeds", len(set(seeds)) == len(seeds), "different"),
            ("seeds", script != BANDIT or in_a_row, "in a row, as 1 2 3"),
            ("total_timesteps", steps is None or has_budget, "left out here"),
            ("total_timesteps", steps is None or steps >= 1, "at least 1"),
            ("cpus_per_run", self.cpus_per_run >= 1, "at least 1"),
            ("gpus_per_run", 0 <= gpus < math.inf, "at least 0"),
            ("gpus_per_run", gpus <= 1 or gpus == int(gpus), "a fraction of 1 or whole"),
            ("max_retries", self.max_retries >= 0, "at least 0"),
        ):
            if not ok:
                value = getattr(self, name)
                value = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UsageError(f"--{name.replace('_', '-')} must be {rule}, got {value}")

    @property
    def setting(self):
        return "smoke" if self.smoke else "fast" if self.fast else "default"

    @property
    def folder(self):
        """--root, absolute."""
        name = self.experiment + ("" if self.setting == "default" else f"-{self.setting}")
        return (self.root or Path("runs") / name).absolute()

    @property
    def cores_and_gpus(self):
        """What Ray reserves for a run and what the run takes; XLA's devices are another number."""
        return self.cpus_per_run, self.gpus_per_run

    @property
    def num_devices(self):
        """XLA devices of a run."""
        return max(int(self.gpus_per_run), 1) if self.gpus_per_run else self.cpus_per_run


def parse_flags(args, flags):
    """Flags as the class `args`; an error of tyro's, a box of text, becomes one line."""
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(args, args=flags)
        except SystemExit as error:
            if not error.code:  # --help
                raise
            text = box.getvalue().partition("\n")[2]  # after the title
            raise UsageError(" ".join(re.sub("[\u2500-\u257f]|-{4,}", " ", text).split())) from None


def start_ray(args):
    """Connects to --address, or starts Ray on this machine -> the module."""
    if not find_spec("ray"):
        raise UsageError("Ray is not installed: pip install -r benchmark/requirements.txt")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options = {"log_to_driver": False, "logging_level": "warning"}
    if args.address:
        host, _, port = args.address.rpartition(":")
        try:
            if host:  # Ray tries for many minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(args.address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"--address {args.address}: {' '.join(str(error).split())}") from None
        return ray
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    ray.init("local", num_cpus=cores, include_dashboard=False, **options)
    for name, wanted in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        there = ray.cluster_resources().get(name, 0)
        if wanted > there:
            rule = f"at most {there:g}, what this machine has"
            raise UsageError(f"--{name.lower()}s-per-run must be {rule}, got {wanted:g}")
    return ray


def lock_root(root):
    """The open file whose lock says that one run.py works in this root."""
    try:
        (root / "logs").mkdir(parents=True, exist_ok=True)
        file = (root / "logs" / "run.lock").open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--root {root}: another run.py works there") from None
    except OSError as error:
        raise UsageError(f"--root {root}: {error.strerror}") from None
    return file


def commit():
    """Of this repository, + if files differ from it."""
    git = "git", "-C", str(ROOT)
    try:
        name = subprocess.check_output((*git, "rev-parse", "--short", "HEAD"), text=True).strip()
        clean = not subprocess.check_output((*git, "status", "--porcelain", "-uno"))
        return name if clean else f"{name}+"
    except (OSError, subprocess.CalledProcessError):
        return ""


def watch_signals():
    """The list to which SIGINT and SIGTERM add their number; a second one ends the program."""
    received = []

    def note(signum, _):
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return received


def refuse_overwriting(root, runs):
    """UsageError if a folder holds a finished run that had other flags."""
    for run in runs:
        record = read_json(root / "logs" / f"{run.name}.json")
        if record.get("status") == "done" and record["flags"] != list(run.flags):
            was = shlex.join(record["flags"])
            raise UsageError(f"--root {root} has a finished {run.name} with other flags: {was}")


def outcome(ray, ref):
    """Exit code of an attempt, or None if it was lost; why it did not end well."""
    try:
        code, last = ray.get(ref)
        return code, f"exit code {code}: {last}"
    except ray.exceptions.RayError as error:
        return None, f"worker lost ({type(error).__name__})"


def sweep(args, runs, ray, stop):
    """Works off the runs, at once those that the cluster has room for; -> names of the complete
    ones. UsageError as soon as a script refuses its flags."""
    root, out = args.folder, args.out or args.folder / "results.csv"
    refuse_overwriting(root, runs)
    try:  # not only when the first run has ended
        out.parent.mkdir(parents=True, exist_ok=True)
        write_results(root, args.experiment, out)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    complete = {run.name for run in runs if status(root, run) == "done"}
    diverged = {run.name for run in runs if status(root, run) == "diverged"}
    waiting = [run for run in runs if run.name not in complete | diverged]
    print(f"{len(runs)} runs, {len(complete)} complete; folder {root}", flush=True)
    cores, gpus = args.cores_and_gpus
    remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=0)(attempt)
    rest = cores, gpus, commit(), os.getcwd()
    active, retries = {}, Counter()
    bar = tqdm(total=len(runs), unit="run", disable=None)
    while not stop:
        ready = [run for run in waiting if run.needs is None or run.needs in complete]
        waiting = [run for run in waiting if run not in ready]
        active |= {remote.remote(root, run, *rest): run for run in ready}
        if not active:
            break
        for ref in ray.wait(list(active), timeout=2)[0]:
            run = active.pop(ref)
            code, why = outcome(ray, ref)
            if code == 2:
                stop_runs(ray, root, active)
                raise UsageError(f"{run.name}: {why.partition('error: ')[2] or why}")
            if code == 0:
                complete.add(run.name)
                bar.write(f"done     {run.name}")
            elif status(root, run) == "diverged":
                diverged.add(run.name)
                bar.write(f"diverged {run.name}: {why}")
            elif retries[run.name] < args.max_retries and not stop:
                retries[run.name] += 1
                waiting.append(run)
                bar.write(f"retry {retries[run.name]}  {run.name}: {why}")
            else:
                bar.write(f"failed   {run.name}: {why}")
            write_results(root, args.experiment, out)
        bar.n = len(complete) + sum(share_done(root / x.name, x.script) for x in active.values())
        bar.refresh()
    bar.close()
    stop_runs(ray, root, active)
    write_results(root, args.experiment, out)
    end = "; stopped, the same command goes on" if stop else ""
    print(f"{len(complete)} of {len(runs)} runs complete; wrote {out}{end}", flush=True)
    for run in runs:
        if run.name not in complete and not stop:
            what = "diverged" if run.name in diverged else "not complete"
            print(f"{what}: {run.name}, see {root / 'logs' / run.name}.log", file=sys.stderr)
    return complete


def stop_runs(ray, root, active):
    """Has the scripts save and end, and waits for them. A cancelled task is over for Ray at once;
    what tells is the lock that its script holds."""
    for ref in active:
        ray.cancel(ref)
    paths = [root / "logs" / f"{run.name}.lock" for run in active.values()]
    deadline = time.monotonic() + STOP_WITHIN
    for path in (path for path in paths if path.exists()):
        with path.open("a") as file:
            while not is_free(file) and time.monotonic() < deadline:
                time.sleep(0.2)


def main():
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        args = parse_flags(Args, argv[:end])
        runs = plan(args, argv[end + 1 :])
        if args.dry_run:
            for run in runs:
                place = "--run-dir", str(args.folder / run.name)
                print("python", shlex.join((run.script, *place, *run.flags)))
            return 0
        with lock_root(args.folder):
            ray = start_ray(args)
            stop = watch_signals()  # after Ray, which has handlers of its own
            complete = sweep(args, runs, ray, stop)
            return 128 + stop[0] if stop else int(len(complete) < len(runs))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
