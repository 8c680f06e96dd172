"""Runs the experiments behind the paper's tables and figures through Ray; survives being killed.

    python benchmark/run.py table2                  # six tasks, four weightings, five seeds
    python benchmark/run.py --tasks Pendulum-v1 -- --weighting square --neg-clip -0.05
    python benchmark/run.py dmc --tasks walker-run-exp --fast
    python benchmark/run.py table2 --gpus-per-run 0.25 --address auto

Each run is one of the public scripts, as --dry-run prints it, in {root}/{task}__{method}__{seed};
what follows -- goes to all of them. The same command again goes on: complete runs are skipped,
begun ones resumed. A run whose worker or machine is lost is resumed on another; Ctrl-C saves
checkpoints first. A run that diverged is not repeated until its logs/NAME.json and its folder are
removed. Exit code: 0 all complete, 1 not all, 2 wrong flags, 128 + signal when stopped.

Writes results.csv and results.runs.csv, see results.py; {root}/logs has log and record of each run.
On several machines this repository and its Python must have the same path on all of them, and
--root must lie on a file system that they share.
"""

import dataclasses
import os
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro
from experiments import EXPERIMENTS, plan
from results import fail, read_json, share_done, write_results
from tqdm import tqdm
from worker import attempt, is_free

STOP_WITHIN = 120  # seconds for the scripts to save and end on Ctrl-C


@dataclasses.dataclass(frozen=True)
class Args:
    experiment: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]] = "mujoco"
    """of experiments.py; mujoco and dmc have no runs of their own but those of --tasks"""
    fast: bool = False  # the README's fast setting
    tasks: tuple[str, ...] = ()  # these alone; also any Gymnasium id, or DOMAIN-TASK[-REWARD]
    methods: tuple[str, ...] = ()  # these of the experiment alone
    seeds: tuple[int, ...] = ()  # default those of the experiment, 1 to 5 for table2
    total_timesteps: int | None = None  # of a run, with 20 evaluations; default the script's
    root: Path | None = None  # of the run folders; default runs/{experiment}[-fast]
    out: Path | None = None  # the CSV to write; default {root}/results.csv
    address: str | None = None  # running Ray cluster (auto, or HOST:PORT); default this machine
    cpus_per_run: int = 1  # cores of a run; their number changes the last digits
    gpus_per_run: float = 0.0  # 0.25 packs four runs on a card, each with a quarter of its memory
    max_retries: int = 5  # attempts after the first at a run that was lost or failed
    dry_run: bool = False  # print the commands and stop

    def __post_init__(self):
        gpus = self.gpus_per_run
        for ok, rule in (
            (len(set(self.seeds)) == len(self.seeds), "--seeds must be different"),
            (self.cpus_per_run > 0, "--cpus-per-run must be at least 1"),
            (0 <= gpus <= 1 or gpus % 1 == 0, "--gpus-per-run must be a fraction of 1 or whole"),
        ):
            if not ok:
                raise ValueError(rule)

    @property
    def folder(self):
        """--root, absolute."""
        name = self.experiment + "-fast" * self.fast
        return (self.root or Path("runs") / name).absolute()


def start_ray(args):
    """Connects to --address, or starts Ray on this machine -> the module."""
    if not find_spec("ray"):
        fail("Ray is not installed: pip install -r benchmark/requirements.txt")
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
            fail(f"--address {args.address}: {error}")
        return ray
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    ray.init("local", num_cpus=cores, include_dashboard=False, **options)
    for name, wanted in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        if wanted > (there := ray.cluster_resources().get(name, 0)):
            fail(f"--{name.lower()}s-per-run {wanted:g}: this machine has {there:g}")
    return ray


def lock_root(root):
    """The open file whose lock says that one run.py works in this root."""
    try:
        (root / "logs").mkdir(parents=True, exist_ok=True)
        file = (root / "logs" / "run.lock").open("a")
    except OSError as error:
        fail(f"--root {root}: {error.strerror}")
    if not is_free(file):
        fail(f"--root {root}: another run.py works there")
    return file


def watch_signals():
    """The list to which SIGINT and SIGTERM add their number; a second one ends the program."""
    received = []

    def note(signum, _):
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return received


def status(root, run):
    """ "done", "diverged" or "unfinished"; refuses a complete run that had other flags."""
    record = read_json(root / "logs" / f"{run.name}.json")
    same = record.get("flags") == list(run.flags)
    if share_done(root / run.name) == 1:
        if record and not same:
            was = shlex.join(record["flags"])
            fail(f"--root {root} has a finished {run.name} with other flags: {was}")
        return "done"
    return record["status"] if same else "unfinished"  # other flags are refused beside --resume


def outcome(ray, ref):
    """Exit code of an attempt, or None if it was lost; why it did not end well."""
    try:
        code, last = ray.get(ref)
        return code, f"exit code {code}: {last}"
    except ray.exceptions.RayError as error:
        return None, f"worker lost ({type(error).__name__})"


def sweep(args, runs, ray, stop):
    """Works off the runs, at once those that the cluster has room for -> how many are complete.
    Ends as soon as a script refuses its flags."""
    root, out = args.folder, args.out or args.folder / "results.csv"
    state = {run.name: status(root, run) for run in runs}
    waiting, active, retries = [x for x in runs if state[x.name] == "unfinished"], {}, Counter()
    remote = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=0)
    remote, rest = remote(attempt), (args.cpus_per_run, args.gpus_per_run, os.getcwd())

    def complete():
        return list(state.values()).count("done")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_results(sorted(root.iterdir()), out)
    except OSError as error:  # now, not when the first run has ended
        fail(f"--out {out}: {error.strerror}")
    print(f"{len(runs)} runs, {complete()} complete; folder {root}", flush=True)
    bar = tqdm(total=len(runs), unit="run", disable=None)
    while not stop:
        ready = [run for run in waiting if state.get(run.needs, "done") == "done"]
        waiting = [run for run in waiting if run not in ready]
        active |= {remote.remote(root, run, *rest): run for run in ready}
        if not active:
            break
        for ref in ray.wait(list(active), timeout=2)[0]:
            run = active.pop(ref)
            code, why = outcome(ray, ref)
            if code == 2:
                stop_runs(ray, root, active)
                fail(f"{run.name}: {why.partition('error: ')[2] or why}")
            state[run.name] = status(root, run)
            if state[run.name] == "unfinished" and retries[run.name] < args.max_retries:
                retries[run.name] += 1
                waiting.append(run)
                bar.write(f"retry {retries[run.name]}  {run.name}: {why}")
            else:
                bar.write(f"{state[run.name]}  {run.name}" + f": {why}" * bool(code))
            write_results(sorted(root.iterdir()), out)
        bar.n = complete() + sum(share_done(root / run.name) for run in active.values())
        bar.refresh()
    bar.close()
    stop_runs(ray, root, active)
    write_results(sorted(root.iterdir()), out)
    end = "; stopped, the same command goes on" if stop else ""
    print(f"{complete()} of {len(runs)} runs complete; wrote {out}{end}", flush=True)
    for name in (name for name, x in state.items() if x != "done" and not stop):
        print(f"{state[name]}: {name}, see {root / 'logs' / name}.log", file=sys.stderr)
    return complete()


def stop_runs(ray, root, active):
    """Has the scripts save and end, and waits for them. A cancelled task is over for Ray at once;
    what tells is the lock that its script holds."""
    for ref in active:
        ray.cancel(ref)
    deadline = time.monotonic() + STOP_WITHIN
    for run in active.values():
        with (root / "logs" / f"{run.name}.lock").open("a") as file:
            while not is_free(file) and time.monotonic() < deadline:
                time.sleep(0.2)


def main():
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    args = tyro.cli(Args, args=argv[:end], description=__doc__)
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
        return 128 + stop[0] if stop else int(complete < len(runs))


if __name__ == "__main__":
    sys.exit(main())
