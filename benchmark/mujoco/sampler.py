"""How far samplers with few steps are from the default one, on trained policies.

    python benchmark/sampler.py runs/fast/*ddpm-20-N32__1

Loads each run folder's policy, meets --states states with it in its task, draws --samples actions
at each of them with every sampler, and prints and writes to a CSV (run, sampler, S, w1, w1_floor,
w1_limit, spread, spread_ddpm20); half a minute a run. All are means over states and action
dimensions, in half action ranges:
    w1        Wasserstein-1 distance of the marginals to those of `ddpm` with S = T
    w1_floor  the same between two draws of `ddpm` with S = T: what a perfect sampler would have
    w1_limit  w1 to `dpm2` with S = T instead, the nearest to the exact flow of this network
    spread    standard deviation of the samples; spread_ddpm20 that of `ddpm` with S = T
"""

import csv
import dataclasses
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

import simpo_mujoco as simpo  # noqa: E402

STEPS = (3, 4, 5, 6, 8, 10, 20)


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders of simpo_mujoco.py with a checkpoint"""
    states: int = 64
    """states to compare at"""
    samples: int = 512
    """actions of each state and sampler"""
    out: Path = Path("benchmark/sampler.csv")
    """the CSV to write"""


def load(folder):
    """-> args and State of a run's last checkpoint."""
    try:
        args = simpo.Args(**json.loads((folder / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise simpo.UsageError(f"{folder} is not a run folder: {error}") from None
    envs = simpo.make_envs(args, 1, 0)
    sizes = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    template = simpo.init_state(args, *sizes, jax.random.key(0))
    return args, simpo.load_checkpoint(folder / "checkpoint.npz", args, template)[0]


def visit(args, state, count, every=5):
    """`count` states [count, o] that the policy meets, every fifth step of ten environments."""
    envs, found = simpo.make_envs(args, 10, simpo.EVAL_SEED), []
    obs, _ = envs.reset()
    for t in range(every * -(-count // 10)):
        if t % every == 0:
            found.append(obs)
        key = jax.random.key(1)
        a0 = simpo.act(args, False, state, obs.astype(np.float32), key, np.int32(t))
        obs = envs.step(simpo.scale_action(envs, np.asarray(a0)))[0]
    return np.concatenate(found)[:count].astype(np.float32)


def draw(args, state, obs, samples, sampler, steps, seed):
    """Sorted samples [states, samples, d] of one sampler."""
    args = dataclasses.replace(args, sampler=sampler, sampling_steps=steps, num_samples=samples)
    a0 = jax.jit(simpo.sample_actions, static_argnums=0)(
        args, state.theta, obs, jax.random.key(seed)
    )
    return np.sort(np.asarray(a0, np.float64), axis=1)


def compare(args, folder):
    """Rows of the CSV of one run."""
    run_args, state = load(folder)
    obs, levels = visit(run_args, state, args.states), run_args.diffusion_steps
    reference, again, limit = (
        draw(run_args, state, obs, args.samples, sampler, levels, seed)
        for sampler, seed in (("ddpm", 1), ("ddpm", 2), ("dpm2", 3))
    )
    distance = lambda a, b: np.abs(a - b).mean()  # noqa: E731  W1 of equal samples, sorted
    for sampler in ("ddpm", "ddim", "dpm2"):
        for steps in (s for s in STEPS if s <= levels):
            a0 = draw(run_args, state, obs, args.samples, sampler, steps, 4)
            yield {
                "run": folder.name,
                "sampler": sampler,
                "S": steps,
                "w1": distance(a0, reference),
                "w1_floor": distance(again, reference),
                "w1_limit": distance(a0, limit),
                "spread": a0.std(axis=1).mean(),
                "spread_ddpm20": reference.std(axis=1).mean(),
            }


def write(args):
    """Compares at every run, before the CSV is touched for the first."""
    rows = (row for folder in args.runs for row in compare(args, folder))
    first = next(rows)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, first, lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain([first], rows):
            row = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(row)
            print(*row.values(), flush=True)


def main():
    """Writes the CSV; returns the exit code."""
    try:
        write(tyro.cli(Args))
    except (simpo.UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
