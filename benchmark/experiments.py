"""The paper's tables and figures as runs of the public scripts; run.py starts them."""

import dataclasses
import itertools
import math
import re
import shlex
from typing import NamedTuple

from paper import TASKS
from results import fail, task_of

MUJOCO, DMC, DNA = "simpo_mujoco.py", "simpo_dmc.py", "simpo_dna.py"
FAST = dict.fromkeys((MUJOCO, DMC), "--sampler dpm2 --sampling-steps 6 --num-samples 8")


class Experiment(NamedTuple):
    script: str
    seeds: tuple
    tasks: dict  # name: flags, as for methods; a task that is not here becomes flags by its name
    methods: dict  # {} where the flags behind -- are the method


FIVE, PLAIN = (1, 2, 3, 4, 5), ("exp", "linear", "square")
CHEETAH = [f"cheetah-run-{reward}" for reward in ("sqrt", "linear", "square", "exp")]
CHEETAH = dict.fromkeys(CHEETAH) | {  # docs/dmc.md: critics err more than exp's rewards at first
    CHEETAH[-1]: "--domain cheetah --task run --reward exp --reward-scale 20"
}
WEIGHTINGS = {name: f"--weighting {name}" for name in PLAIN}
NEGATIVE = {"linear_neg": "--neg-clip -0.05"}
BOUNDS = {f"eps_kl={x}": f"--eps-kl {x}" for x in (1.0, 1.5, 2.0)}  # of N = 32
CHOICES = """target-samples=1 act-samples=1 noise-start=0.2 noise-end=0.1 error-bound=1e9
    policy-delay=1 critic-steps=1 tau=0.005 reward-scale=1 num-envs=1""".split()
# one change each from Lin. Neg.
CHOICES = NEGATIVE | {name: f"--neg-clip -0.05 --{name}" for name in CHOICES}
TUNED = {name: f"--weighting {name}" for name in (*PLAIN, "wd1", "uniform")}
for x, name in itertools.product((0.05, 1), PLAIN[1:]):
    TUNED[f"{name}_neg{x}"] = f"--weighting {name} --neg-clip -{x}"
for name in ("wd1", "linear_neg1", "square_neg1"):
    TUNED[f"{name}_floor"] = f"{TUNED[name]} --neg-floor 0.05"
TUNED["square_anchor"] = "--weighting square --kl-weight 1"

# Where the paper is silent: seeds of all but Table 2; tasks and weighting of figure 6 (all of Table
# 2, Linear); the clip of DNA. choices is ours: what the paper leaves open.
EXPERIMENTS = {
    "mujoco": Experiment(MUJOCO, (1,), {}, {}),
    "dmc": Experiment(DMC, (1,), {}, {}),
    "table2": Experiment(MUJOCO, FIVE, dict.fromkeys(TASKS), WEIGHTINGS | NEGATIVE),
    "figure5": Experiment(DMC, FIVE, CHEETAH, WEIGHTINGS),
    "figure6": Experiment(MUJOCO, FIVE, dict.fromkeys(TASKS), BOUNDS),
    "choices": Experiment(MUJOCO, (1,), {"HalfCheetah-v4": None}, CHOICES),
    "table3": Experiment(DNA, (1, 2, 3), {"generated": ""}, TUNED),
}
# Flags of simpo_dna.py for its pretraining; the last five are for that alone.
PRETRAINING = """--seed --data --drop-bad-rows --score-column --checkpoint-every --hidden-dim
    --num-layers --pretrain-steps --pretrain-lr --batch-size""".split()
OWN = {"--env-id", "--domain", "--task", "--reward", "--seed", "--run-dir", "--resume"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a script."""

    task: str
    method: str
    seed: str
    script: str
    flags: tuple
    needs: str | None = None  # name of the run that must be complete before

    @property
    def name(self):
        """Its folder."""
        return re.sub("[/:]", "-", f"{self.task}__{self.method}__{self.seed}")


def merge(*texts):
    """{flag: [values]} of texts "--a 1 --b"; a later value takes the place of an earlier one."""
    flags, name = {}, None
    for token in shlex.split(" ".join(texts)):
        if token.startswith("--"):
            name, *values = token.split("=", 1)
            flags[name] = values
        elif name is None:
            fail(f"what follows -- must be flags of the scripts, not {token}")
        else:
            flags[name].append(token)
    return flags


def as_list(flags):
    return tuple(token for name, values in flags.items() for token in (name, *values))


def task_flags(experiment, task):
    """Flags of a task: those of the table, or by its name: ENV_ID, or DOMAIN-TASK[-REWARD]."""
    if (flags := experiment.tasks.get(task)) is not None:
        return flags
    if experiment.script == MUJOCO:
        return f"--env-id {task}"
    names = task.split("-")
    if len(names) not in (2, 3):
        fail(f"--tasks {task}: for {experiment.script} a task is DOMAIN-TASK[-REWARD]")
    return "--domain {} --task {} --reward {}".format(*names, *["stock"][: 3 - len(names)])


def plan(args, extra=()):
    """The runs of an experiment, seed by seed; `extra` are flags for the scripts."""
    experiment, total = EXPERIMENTS[args.experiment], args.total_timesteps
    if args.fast and experiment.script == DNA:
        fail("--fast is for the experiments of simpo_mujoco.py and simpo_dmc.py")
    base, extra, runs = FAST.get(experiment.script, "") * args.fast, merge(shlex.join(extra)), []
    if total is not None:
        every = f"--eval-every {max(total // 20, 1)} --checkpoint-every {max(total // 40, 1)}"
        base += f" --total-timesteps {total} {every}"
    for name in extra.keys() & OWN:
        fail(f"{name} cannot follow --, run.py sets it")
    words = (name[2:] + "=" * bool(values) + " ".join(values) for name, values in extra.items())
    methods = experiment.methods or {",".join(words) or "default": ""}
    for name in set(args.methods) - set(methods):
        fail(f"--methods {name} is not among {', '.join(methods)}; flags may follow --")
    if not (tasks := args.tasks or tuple(experiment.tasks)):
        fail("--tasks must name at least one")
    each = itertools.product(args.seeds or experiment.seeds, tasks, args.methods or methods)
    for seed, task, method in each:
        own = task_flags(experiment, task), f"--seed {seed}", methods[method]
        flags = merge(base, *own) | extra
        if args.experiment == "figure6" and "--eps-kl" not in extra:  # shares of log N
            log_n = math.log(int(flags.get("--num-samples", ["32"])[0]))
            flags["--eps-kl"] = [f"{float(flags['--eps-kl'][0]) / math.log(32) * log_n:g}"]
        runs.append(Run(task, method, str(seed), experiment.script, as_list(flags)))
    return plan_pretraining(args, runs, extra) if experiment.script == DNA else runs


def plan_pretraining(args, runs, extra):
    """Runs of Table 3, preceded by the pretraining of a model for each seed, from which all of that
    seed start, unless --pretrained names one."""
    task = task_of({"data": extra.get("--data", [None])[0]})
    first, then = {}, []
    for run in (dataclasses.replace(run, task=task) for run in runs):
        flags = merge(shlex.join(run.flags))
        model = {"--pretrain-only": []} | {x: y for x, y in flags.items() if x in PRETRAINING}
        model = dataclasses.replace(run, method="pretraining", flags=as_list(model))
        flags = {x: y for x, y in flags.items() if x not in PRETRAINING[-5:]}
        if "--pretrained" not in extra:
            first[model.name] = model
            flags["--pretrained"] = [str(args.folder / model.name / "pretrained.npz")]
            run = dataclasses.replace(run, needs=model.name)
        then.append(dataclasses.replace(run, flags=as_list(flags)))
    return [*first.values(), *then]
