"""The paper's tables and figures as runs of the public scripts; run.py starts them."""

import dataclasses
import shlex
from pathlib import Path
from typing import NamedTuple

MUJOCO, DMC = "simpo_mujoco.py", "simpo_dmc.py"
BANDIT, DNA = "simpo_bandit.py", "simpo_dna.py"

# The documented fast setting: flags by script.
CALLS = "--sampler dpm2 --sampling-steps 6 --num-samples 6 --eps-kl 0.8"
FAST = {
    MUJOCO: CALLS,
    DMC: CALLS,
    BANDIT: "",  # takes a minute as it is
    DNA: "--sampling-steps 32",
}
TINY = """--num-samples 4 --sampling-steps 3 --eps-kl 0.6 --hidden-dim 32 --batch-size 32
    --learning-starts 300 --buffer-size 1500 --eval-episodes 3 --total-timesteps 4000
    --eval-every 1000 --checkpoint-every 250"""
SMOKE = {
    MUJOCO: TINY,
    DMC: TINY,
    BANDIT: "--epochs 20 --grad-steps 8",
    DNA: """--pretrain-steps 60 --batch-size 16 --hidden-dim 8 --finetune-steps 4 --num-groups 2
        --num-samples 8 --sampling-steps 8 --eps-kl 0.9 --eval-samples 64""",
}


class UsageError(Exception):
    """Bad input. `main` prints it as one line and exits with code 2."""


class Experiment(NamedTuple):
    script: str
    seeds: tuple
    tasks: dict  # name: flags, as for methods
    methods: dict


def weightings(*names, **clips):
    """{method: flags} of the weightings, and of those with a clip, as linear_neg=-0.05."""
    plain = {name: f"--weighting {name}" for name in names}
    for name, clip in clips.items():
        plain[name] = f"--weighting {name.removesuffix('_neg')} --neg-clip {clip}"
    return plain


FIVE, TWENTY = tuple(range(1, 6)), tuple(range(1, 21))
PLAIN = "exp", "linear", "square"
GYM = {
    f"{name}-v4": f"--env-id {name}-v4"
    for name in ("HalfCheetah", "Humanoid", "Ant", "Walker2d", "Hopper", "Swimmer")
}
CHEETAH = {
    f"cheetah-run-{name}": f"--domain cheetah --task run --reward {name}"
    for name in ("sqrt", "linear", "square", "exp")
}
SHORT = """--batch-size 64 --learning-starts 5000 --total-timesteps 20000 --noise-steps 15000
    --eval-every 5000"""
EASY = {
    f"{name}-v4": f"--env-id {name}-v4 {SHORT}" for name in ("InvertedDoublePendulum", "Reacher")
}
CHOICES = {  # one change each from the first, Lin. Neg. as in Table 2
    "linear_neg": "--neg-clip -0.05",
    "linear": "--neg-clip 0",
    "exp": "--weighting exp",
    "clip=-0.5": "--neg-clip -0.5",
    "no_train_noise": "--neg-clip -0.05 --no-train-noise",
    "noise_start=0.1": "--neg-clip -0.05 --noise-start 0.1",
    "noise_end=0.3": "--neg-clip -0.05 --noise-end 0.3",
    "policy_delay=1": "--neg-clip -0.05 --policy-delay 1",
    "reward_scale=1": "--neg-clip -0.05 --reward-scale 1",
    "num_envs=1": "--neg-clip -0.05 --num-envs 1",
}
BUMPS = {name: f"--figure 3 --landscape {name}" for name in ("broad", "sharp")}
BOUNDS = {f"eps_kl={x}": f"--eps-kl {x}" for x in (1.0, 1.5, 2.0)}  # of N = 32
TUNED = weightings(*PLAIN, "wd1", linear_neg=-1, square_neg=-1)
TUNED = {name: flags + " --no-compare" * (name != "exp") for name, flags in TUNED.items()}

# The ablation is ours. Where the paper is silent: seeds of all but Table 2; tasks and weighting of
# figure 6 (all of Table 2, Linear); clips of the bandit (simpo_bandit.py says why) and of DNA.
EXPERIMENTS = {
    "table2": Experiment(MUJOCO, FIVE, GYM, weightings(*PLAIN, linear_neg=-0.05)),
    "figure2": Experiment(
        BANDIT,
        TWENTY,
        {"escape": "--figure 2 --landscape escape"},
        weightings(*PLAIN, linear_neg=-0.6),
    ),
    "figure3": Experiment(BANDIT, TWENTY, BUMPS, weightings(*PLAIN)),
    "figure5": Experiment(DMC, FIVE, CHEETAH, weightings(*PLAIN)),
    "figure6": Experiment(MUJOCO, FIVE, GYM, BOUNDS),
    "ablation": Experiment(MUJOCO, (1, 2, 3), EASY, CHOICES),
    "table3": Experiment(DNA, (1, 2, 3), {"generated": ""}, TUNED),
}
# Flags of simpo_dna.py for its pretraining; the last three are for that alone.
PRETRAINING = """--seed --data --drop-bad-rows --score-column --hidden-dim --num-layers
    --num-devices --checkpoint-every --pretrain-steps --pretrain-lr --batch-size""".split()
OWN = "--seed --num-seeds --run-dir --resume --evaluate --num-devices".split()  # set by run.py


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a script. The seed of a bandit is a range of them, trained at once."""

    experiment: str
    task: str
    method: str
    seed: str
    setting: str
    script: str
    flags: tuple
    needs: str | None = None  # name of the run that must be complete before

    @property
    def name(self):
        """Its folder."""
        return f"{self.task}__{self.method}__{self.seed}"


def merge(*texts):
    """{flag: [values]} of texts "--a 1 --b"; a later value takes the place of an earlier one."""
    flags, name = {}, None
    for token in shlex.split(" ".join(texts)):
        if token.startswith("--"):
            name, *values = token.split("=", 1)
            flags[name] = values
        elif name is None:
            raise UsageError(f"what follows -- must be flags of the scripts, got {token}")
        else:
            flags[name].append(token)
    return flags


def as_list(flags):
    return tuple(token for name, values in flags.items() for token in (name, *values))


def base_flags(args):
    """Flags that all runs of an experiment share: the setting, the budget and the devices."""
    script, total = EXPERIMENTS[args.experiment].script, args.total_timesteps
    base = {"default": "", "fast": FAST[script], "smoke": SMOKE[script]}[args.setting]
    if total:
        every = f"--eval-every {max(total // 20, 1)} --checkpoint-every {max(total // 40, 1)}"
        base += f" --total-timesteps {total} {every}"
    if script != BANDIT:  # it has no such flag and takes the number from XLA_FLAGS
        base += f" --num-devices {args.num_devices}"
    return base


def seed_flags(args):
    """{name of a run's seed: flags}."""
    experiment = EXPERIMENTS[args.experiment]
    seeds = args.seeds or experiment.seeds
    if experiment.script == BANDIT:
        return {f"{seeds[0]}-{seeds[-1]}": f"--seed {seeds[0]} --num-seeds {len(seeds)}"}
    seeds = seeds[:1] if args.smoke and not args.seeds else seeds
    return {str(seed): f"--seed {seed}" for seed in seeds}


def plan(args, extra=()):
    """The runs of an experiment, seed by seed; `extra` are flags for the scripts."""
    script, _, tasks, methods = EXPERIMENTS[args.experiment]
    base, extra, runs = base_flags(args), merge(shlex.join(extra)), []
    for name in extra.keys() & OWN:
        raise UsageError(f"{name} cannot follow --, run.py sets it")
    for seed, seeding in seed_flags(args).items():
        for task in args.tasks or tasks:
            for method in args.methods or methods:
                flags = merge(base, seeding, tasks[task], methods[method])
                if args.experiment == "figure6":  # a share of log N, as the setting's own is
                    share = float(merge("--eps-kl 1.5", base)["--eps-kl"][0]) / 1.5
                    flags["--eps-kl"] = [f"{float(flags['--eps-kl'][0]) * share:.4g}"]
                head = args.experiment, task, method, seed, args.setting, script
                runs.append(Run(*head, as_list(flags | extra)))
    return plan_pretraining(args, runs, extra) if script == DNA else runs


def plan_pretraining(args, runs, extra):
    """Runs of Table 3, preceded by the pretraining of a model for each seed, from which all of that
    seed start, unless --pretrained names one."""
    if extra.get("--data"):
        name = Path(extra["--data"][0]).name.split(".")[0]
        runs = [dataclasses.replace(run, task=name) for run in runs]
    first, then = {}, []
    for run in runs:
        flags = merge(shlex.join(run.flags))
        model = {x: values for x, values in flags.items() if x in PRETRAINING}
        model = {"--pretrain-only": [], **model}
        model = dataclasses.replace(run, method="pretraining", flags=as_list(model))
        flags = {x: values for x, values in flags.items() if x not in PRETRAINING[-3:]}
        if "--pretrained" in extra:
            then.append(dataclasses.replace(run, flags=as_list(flags)))
            continue
        flags["--pretrained"] = [str(args.folder / model.name / "pretrained.npz")]
        first[model.name] = model
        then.append(dataclasses.replace(run, flags=as_list(flags), needs=model.name))
    return [*first.values(), *then]
