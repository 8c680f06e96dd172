"""The host's part of a run of simpo_dna.py: checkpoints, curves and figures."""

import argparse
import dataclasses
import fcntl
import itertools
import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib
import numpy as np
import tyro
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dna.files import fill, load_arrays, save_tree

PACKAGES = ("jax", "optax", "numpy", "scipy", "safetensors")
DIVERGED = 3  # exit code of a run whose numbers are not finite


# ---- flags and the run folder
def read_args(folder, flags):
    """The flags of a run, from its folder; `flags` is the dataclass of today's."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
    except (OSError, ValueError):
        raise SystemExit(f"error: {folder} is no run folder") from None
    names = {field.name for field in dataclasses.fields(flags)}
    differing = names.symmetric_difference(saved)
    if differing:
        versions = json.loads((Path(folder) / "versions.json").read_text())
        raise SystemExit(
            f"error: {folder} was made by commit {versions['commit']}, which differs"
            f" in these flags: {', '.join(sorted(differing))}"
        )
    return flags(**saved)


def parse_args(flags):
    """The command line; beside --resume the flags of that run hold.

    Beside it --finetune-steps may grow, which prolongs a run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--finetune-steps", type=int)
    known, others = parser.parse_known_args()
    if not known.resume:
        return tyro.cli(flags)
    if not {"--track"}.issuperset(others):
        rule = "--resume takes only --track and --finetune-steps beside it"
        raise SystemExit(f"error: {rule}")
    saved = read_args(known.resume, flags)
    args = tyro.cli(flags, default=saved)
    if args.finetune_steps < saved.finetune_steps:
        steps = saved.finetune_steps
        raise SystemExit(
            f"error: --finetune-steps of that run is {steps}, and may grow"
        )
    if args.finetune_steps > saved.finetune_steps:
        kept = dataclasses.replace(args, resume=None, track=saved.track)
        write_json(Path(args.resume) / "args.json", dataclasses.asdict(kept))
        (Path(args.resume) / "metrics.csv").unlink(missing_ok=True)
    return args


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2))


def make_run_dir(args, name):
    """A new folder, runs/{name}__{time} or --run-dir, for the files of a run."""
    default = f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or default)
    for count in itertools.count(2):
        try:
            run_dir.mkdir(parents=True)
            break
        except OSError as error:
            if args.run_dir or not isinstance(error, FileExistsError):
                raise SystemExit(
                    f"error: --run-dir {run_dir}: {error.strerror}"
                ) from None
            run_dir = Path(f"{default}-{count}")  # two runs started in one second

    here = Path(__file__).parent
    status, commit = subprocess.getstatusoutput(f"git -C '{here}' rev-parse HEAD")
    versions = {package: version(package) for package in PACKAGES}
    versions["commit"] = commit if status == 0 else None
    versions["devices"] = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    write_json(run_dir / "args.json", dataclasses.asdict(args))
    write_json(run_dir / "versions.json", versions)
    return run_dir


def track(args, run_dir):
    """Mirrors TensorBoard to Weights & Biases."""
    import wandb

    wandb.init(
        project="simpo",
        id=run_dir.name,
        resume="allow",
        config=vars(args),
        sync_tensorboard=True,
    )


def lock(run_dir):
    """Ends this process if another one trains in the folder."""
    file = (run_dir / "args.json").open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: another process trains in {run_dir}") from None
    return file  # the lock is held while this file is open


# ---- phases
def cut_rows(path, last_step):
    """Leaves the whole rows of a CSV up to a step; without its header no file."""
    lines = path.read_text().splitlines(keepends=True)
    kept = []
    for line in lines:
        cells = line.split(",")
        is_whole = line.endswith("\n") and len(cells) == lines[0].count(",") + 1
        if is_whole and (not kept or int(cells[0]) <= last_step):
            kept.append(line)
    if kept:
        path.write_text("".join(kept))
    else:
        path.unlink()


class Phase:
    """Pretraining or fine-tuning: its step, checkpoint, {name}.csv, log and bar.

    TensorBoard counts the steps of both phases: those of this one start at `first`.
    """

    def __init__(self, run_dir, name, total, shown, first=0):
        self.name = name
        self.shown = shown  # the metric beside the bar
        self.total = total
        self.step = 0
        self.first = first
        self.kind = f"{name} checkpoint"
        self.checkpoint = run_dir / f"{name}_checkpoint.safetensors"
        self.csv = run_dir / f"{name}.csv"

    def start(self, state):
        """-> the state of the checkpoint, if there is one, else the one given.

        Rows of the CSV behind the checkpoint are cut off."""
        if self.checkpoint.exists():
            arrays, meta = load_arrays(self.checkpoint, self.kind)
            state = fill(state, arrays, self.checkpoint)
            self.step = meta["step"]
        if self.csv.exists():
            cut_rows(self.csv, self.step)
        step = self.first + self.step
        self.log = SummaryWriter(str(self.csv.parent), purge_step=step + 1)
        self.bar = tqdm(
            total=self.total, initial=self.step, desc=self.name, disable=None
        )
        return state

    def advance(self):
        self.step += 1
        self.bar.update()

    def save(self, state):
        save_tree(self.checkpoint, state, self.kind, step=self.step)

    def write(self, metrics):
        """Logs {name: scalar} of this step; a value that is not finite ends the run.

        The first row has all columns; a later one may have empty cells."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if not self.csv.exists():
            self.csv.write_text(",".join(["step", *metrics]) + "\n")
        with self.csv.open("r+") as file:
            columns = file.readline().strip().split(",")
            cells = [str(self.step)]
            for name in columns[1:]:
                cells.append(f"{metrics[name]:.8g}" if name in metrics else "")
            file.seek(0, 2)
            file.write(",".join(cells) + "\n")
        for name, value in metrics.items():
            self.log.add_scalar(f"losses/{name}", value, self.first + self.step)
            if not math.isfinite(value):
                where = f"at step {self.step} of {self.name}"
                print(f"error: {name} is not finite {where}", file=sys.stderr)
                raise SystemExit(DIVERGED)
        text = f"{self.shown} {metrics[self.shown]:.3f}"
        self.bar.set_postfix_str(text)
        often = self.step % max(self.total // 20, 1) == 0
        if self.bar.disable and (
            often or self.step == self.total
        ):  # without a terminal
            print(f"{self.name} {self.step}/{self.total} {text}", flush=True)

    def end(self):
        self.bar.close()
        self.log.close()


def draw_curves(run_dir):
    """curves.png: scores, likelihoods and weights over the rows of finetune.csv."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = np.genfromtxt(run_dir / "finetune.csv", delimiter=",", names=True, ndmin=1)
    panels = {
        "score of the samples": ("q_median", "q_max", "eval_median"),
        "bound on -log p, nats a base": ("nll", "nll_pretrained"),
        "weights": ("ess", "w_max"),
    }
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.5))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            known = np.isfinite(curve[name])
            axis.plot(curve["step"][known], curve[name][known], label=name)
        axis.set(xlabel="iteration", title=title)
        axis.legend()
    fig.savefig(run_dir / "curves.png", dpi=80, bbox_inches="tight")
    plt.close(fig)
