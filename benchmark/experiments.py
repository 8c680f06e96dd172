"""The paper's tables and figures as flags of the public scripts; run.py starts them."""

import os
from pathlib import Path
from typing import NamedTuple

from benchmark.results import TASKS, fail

MUJOCO = "simpo_mujoco.py"
DMC = "simpo_dmc.py"
DNA = "simpo_dna.py"
BANDIT = "simpo_bandit.py"


class Experiment(NamedTuple):
    script: str
    tasks: tuple[str, ...]
    methods: dict[str, str]  # {name: flags}
    flags: str = ""  # of all runs
    result: str = "eval.csv"  # file of a complete run; this one reaches the last step


WEIGHTINGS = {
    "exp": "--weighting exp",
    "linear": "--weighting linear",
    "square": "--weighting square",
}
NEGATIVE = {
    "linear_neg": "--weighting linear --neg-clip -0.05",
    "square_neg": "--weighting square --neg-clip -0.05",
}
SHARES = {  # of log 8, as 1.0, 1.5 and 2.0 nats are of the paper's log 32
    "eps_kl=1.0": "--num-samples 8 --eps-kl 0.6",
    "eps_kl=1.5": "--num-samples 8 --eps-kl 0.9",
    "eps_kl=2.0": "--num-samples 8 --eps-kl 1.2",
}
DNA_METHODS = WEIGHTINGS | {
    "wd1": "--weighting wd1",
    "uniform": "--weighting uniform",
    "linear_neg0.05": "--weighting linear --neg-clip -0.05",
    "linear_neg1": "--weighting linear --neg-clip -1",
    "square_neg0.05": "--weighting square --neg-clip -0.05",
    "square_neg1": "--weighting square --neg-clip -1",
    "wd1_floor": "--weighting wd1 --neg-floor 0.05",
    "linear_neg1_floor": "--weighting linear --neg-clip -1 --neg-floor 0.05",
    "square_neg1_floor": "--weighting square --neg-clip -1 --neg-floor 0.05",
    "square_anchor": "--weighting square --kl-weight 1",
}
REWARDS = tuple(f"cheetah-run-{x}" for x in ("sqrt", "linear", "square", "exp"))
SHORT = "--total-timesteps 300000"
EXPERIMENTS = {
    "table2": Experiment(MUJOCO, tuple(TASKS), WEIGHTINGS | NEGATIVE),
    "figure5": Experiment(DMC, REWARDS, WEIGHTINGS, SHORT),
    "figure6": Experiment(MUJOCO, ("HalfCheetah-v4", "Walker2d-v4"), SHARES, SHORT),
    "bandit": Experiment(
        BANDIT, ("figures",), {"100_seeds": "--num-seeds 100"}, result="summary.csv"
    ),
    "table3": Experiment(DNA, ("generated",), DNA_METHODS, result="metrics.csv"),
}


def task_flags(script, task):
    """Flags of a task: a Gymnasium id, DOMAIN-TASK[-REWARD], or a file of sequences."""
    if script == MUJOCO:
        return ["--env-id", task]
    if script == DNA and task != "generated":
        return ["--data", os.path.abspath(task)]
    if script != DMC:
        return []
    domain, _, rest = task.partition("-")
    name, _, reward = rest.partition("-")
    if not name:
        fail(f"--tasks {task} is not DOMAIN-TASK or DOMAIN-TASK-REWARD")
    flags = ["--domain", domain, "--task", name, "--reward", reward or "stock"]
    if task == "cheetah-run-exp":  # the critics err more than its rewards at scale 0.2
        flags += ["--reward-scale", "20"]
    return flags


def run_name(script, task, method, seed):
    """Of the folder of a run."""
    if script == DNA:
        task = Path(task).name.split(".")[0]
    return f"{task}__{method}__{seed}".replace("/", "-").replace(":", "-")
