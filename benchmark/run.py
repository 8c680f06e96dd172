"""Runs the experiments behind the paper's tables and figures through Ray.

    python -m benchmark.run table2 --methods linear linear_neg --seeds 1 2
    python -m benchmark.run table2 --tasks Pendulum-v1 -- --total-timesteps 50000
    python -m benchmark.run figure5 --address auto --gpus-per-run 0.25

Each run is one of the public scripts, in ROOT/TASK__METHOD__SEED; --dry-run prints the
commands, ROOT/logs has their output. Flags after -- are for all of them. The same
command again continues: complete runs are skipped, begun ones resumed from their last
checkpoint. Ray resumes a run whose worker is lost, up to five times. Ctrl-C loses what
came after the last checkpoints. Nothing is deleted. On several machines this
repository, its Python and ROOT need the same path everywhere.

Exit code: 0 all runs are complete, 1 not all, 2 wrong usage.
"""

import ctypes
import dataclasses
import importlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from benchmark.experiments import EXPERIMENTS, run_name, task_flags
from benchmark.results import PLACE, collect, fail, is_complete, read_json

REPOSITORY = Path(__file__).resolve().parents[1]
RETRIES = 5
ENDS = {0: "complete", 1: "failed", 2: "refused its flags", 3: "diverged"}


@dataclasses.dataclass(frozen=True)
class Args:
    experiment: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]
    tasks: tuple[str, ...] = ()  # default all; any id, DOMAIN-TASK[-REWARD], file
    methods: tuple[str, ...] = ()  # default all of the experiment
    seeds: tuple[int, ...] = (1,)
    root: Path | None = None  # of the run folders; default runs/EXPERIMENT
    address: str | None = None  # of a Ray cluster: auto or HOST:PORT; default none
    cpus_per_run: int = 1
    gpus_per_run: float = 0.0  # 0.25: four runs share a GPU and its memory
    dry_run: bool = False  # print the commands and stop


class Run(NamedTuple):
    folder: Path
    script: str
    flags: list  # as text
    args: dict  # the same as the script's own parser reads them
    result: str  # file of a complete run

    @property
    def log(self):
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    def is_begun(self):
        return any(self.folder.glob("*checkpoint.[ns]*"))  # npz or safetensors

    def is_complete(self):
        if self.result == "eval.csv":
            return is_complete(self.folder)
        return (self.folder / self.result).exists()


def flag_names(flags):
    """{--flag} in one spelling: --env_id=X is --env-id."""
    names = [flag.split("=")[0] for flag in flags if flag.startswith("--")]
    return {name.replace("_", "-") for name in names}


def plan(args, extra=()):
    """The runs of an experiment; `extra` are flags for their scripts."""
    experiment = EXPERIMENTS[args.experiment]
    script = experiment.script
    parser = importlib.import_module(script.removesuffix(".py")).Args
    root = (args.root or Path("runs") / args.experiment).absolute()
    tasks = args.tasks or experiment.tasks
    methods = args.methods or tuple(experiment.methods)
    for method in methods:
        if method not in experiment.methods:
            fail(f"--methods {method} is none of {', '.join(experiment.methods)}")

    if not args.seeds:
        fail("--seeds names none")
    taken = ["--data", *(f"--{name}" for name in PLACE)]
    taken += " ".join(experiment.methods.values()).split()

    runs = []
    for seed, task, method in itertools.product(args.seeds, tasks, methods):
        flags = [*task_flags(script, task), "--seed", str(seed)]
        flags += experiment.methods[method].split() + experiment.flags.split()
        for name in flag_names(flags + taken) & flag_names(extra):
            fail(f"{name} cannot follow --: benchmark.run sets it")
        flags += extra
        run = Run(
            folder=root / run_name(script, task, method, seed),
            script=script,
            flags=flags,
            args=vars(tyro.cli(parser, args=flags, prog=script)),
            result=experiment.result,
        )
        if run.folder in [other.folder for other in runs]:
            fail(f"{run.folder.name} is named twice")
        runs.append(run)
    return runs


def check_folder(run):
    """Refuses a folder that is not this run's."""
    saved = read_json(run.folder / "args.json")
    if run.folder.exists() and not saved and not run.log.exists():
        fail(f"{run.folder} holds no run: rename it")
    for name, value in run.args.items():
        passed = name in PLACE or name in ("track", "capture_video", "data_sha256")
        if saved and not passed and saved.get(name) != value:
            fail(f"{run.folder} has {name} {saved.get(name)}, not {value}")


def die_with_parent():
    """Linux ends this process when the Ray worker that started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def train(run, cpus, gpus, directory):
    """On a Ray worker: starts or resumes a run -> its exit code; raises if it was
    killed, where trying again may help."""
    if run.is_complete():  # its worker was lost at the end
        return 0
    if run.is_begun():
        flags = ["--resume", run.folder]
    else:
        if run.folder.exists():  # killed before its first checkpoint
            run.folder.rename(run.log.with_suffix(f".{time.time_ns()}"))
        flags = ["--run-dir", run.folder, *run.flags]

    # as many JAX devices and threads as cores
    env = {"JAX_NUM_CPU_DEVICES": str(cpus), "PJRT_NPROC": str(cpus)}
    if gpus == 0:
        env["JAX_PLATFORMS"] = "cpu"
    elif gpus < 1:
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(0.9 * gpus)
    with run.log.open("a") as log:
        code = subprocess.run(
            [sys.executable, REPOSITORY / run.script, *flags],
            cwd=directory,
            env=os.environ | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        ).returncode
    if code < 0:
        raise RuntimeError(f"killed by signal {-code}")
    return code


def start_ray(args):
    """Starts Ray on this machine, or connects to a cluster -> the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(args.address or "local", log_to_driver=False, logging_level="warning")
    there = ray.cluster_resources()
    for name, wanted in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        if wanted > there.get(name, 0):
            fail(f"--{name.lower()}s-per-run {wanted}: there are {there.get(name, 0)}")
    return ray


def sweep(args, runs):
    """Works off the runs -> how many are not complete."""
    for run in runs:
        check_folder(run)
    waiting = [run for run in runs if not run.is_complete()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} complete", flush=True)
    runs[0].log.parent.mkdir(parents=True, exist_ok=True)
    ray = start_ray(args)
    remote = ray.remote(
        num_cpus=args.cpus_per_run,
        num_gpus=args.gpus_per_run,
        max_retries=RETRIES,
        retry_exceptions=True,
    )(train)
    active = {}
    for run in waiting:
        ref = remote.remote(run, args.cpus_per_run, args.gpus_per_run, os.getcwd())
        active[ref] = run
    left = 0
    while active:
        (ref,), _ = ray.wait(list(active))
        run = active.pop(ref)
        try:
            code = ray.get(ref)
        except ray.exceptions.RayError as error:
            code = str(error).strip().splitlines()[-1]
        print(f"{run.folder.name}: {ENDS.get(code, code)}, see {run.log}", flush=True)
        left += code != 0
        if run.result == "eval.csv":
            root = run.folder.parent
            folders = [run.folder for run in runs if run.folder.exists()]
            if folders:
                collect(folders, root.with_name(root.name + ".csv"))
    return left


def main(argv):
    end = argv.index("--") if "--" in argv else len(argv)
    args = tyro.cli(Args, args=argv[:end], description=__doc__)
    runs = plan(args, argv[end + 1 :])
    if args.dry_run:
        for run in runs:
            command = ["python", run.script, "--run-dir", str(run.folder), *run.flags]
            print(shlex.join(command))
        return 0
    return int(sweep(args, runs) > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
