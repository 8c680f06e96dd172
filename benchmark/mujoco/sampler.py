"""How far samplers with few steps are from the default one, on a trained policy.

    python benchmark/mujoco/sampler.py runs/NAME --out benchmark/mujoco/sampler.csv

Loads a run's checkpoint, meets --states states with its policy, draws --samples actions at each of
them with every sampler, and prints and writes sampler, steps, w1, w1_floor, spread, all means over
states and action dimensions, in half action ranges:
    w1        Wasserstein-1 distance of the marginals to those of `ddpm` at all T levels
    w1_floor  the same between two draws of that one: what a perfect sampler would have
    spread    standard deviation of the samples
"""

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

import simpo_mujoco as simpo


def load(folder):
    """-> args and State of a run, as for --evaluate."""
    args = simpo.Args(**json.loads((folder / "args.json").read_text()))
    envs = simpo.make_envs(args)
    (o,), (d,) = envs.single_observation_space.shape, envs.single_action_space.shape
    state = simpo.init_state(args, o, d, jax.random.key(0))
    unused = "theta", "critics_target", "theta_opt", "critics_opt", "log_lam"
    state = state._replace(**dict.fromkeys(unused))
    return args, simpo.load(folder / "checkpoint.npz", state)[0]


def visit(args, state, count, every=5):
    """`count` states [count, o] that the policy meets, every fifth step of ten environments."""
    envs, found = simpo.make_envs(dataclasses.replace(args, num_envs=10)), []
    obs, _ = envs.reset(seed=2**31)
    for t in range(every * -(-count // 10)):
        if t % every == 0:
            found.append(obs)
        key, n = jax.random.key(1), args.num_samples
        a0 = simpo.best_action(args, state, obs, n, key, t)
        obs = envs.step(np.asarray(a0))[0]
    return np.concatenate(found)[:count]


def draw(args, state, obs, samples, sampler, steps, seed):
    """Sorted samples [states, samples, d] of one sampler."""
    args = dataclasses.replace(args, sampler=sampler, sampling_steps=steps)
    a0 = jax.jit(simpo.sample_actions, static_argnums=(0, 3))(
        args, state.theta_old, obs, samples, jax.random.key(seed)
    )
    return np.sort(np.asarray(a0, np.float64), axis=1)


def compare(folder, states, samples, numbers_of_steps):
    """Rows of the CSV."""
    args, state = load(folder)
    obs, levels = visit(args, state, states), args.diffusion_steps
    reference, again = (draw(args, state, obs, samples, "ddpm", levels, seed) for seed in (1, 2))
    for sampler in ("ddpm", "dpm2"):
        for steps in (s for s in numbers_of_steps if s <= levels):
            a0 = draw(args, state, obs, samples, sampler, steps, 3)
            distances = [np.abs(x - reference).mean() for x in (a0, again)]  # W1: both are sorted
            numbers = (*distances, a0.std(axis=1).mean())
            yield sampler, steps, *(f"{x:.4f}" for x in numbers)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of simpo_mujoco.py")
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10, 20])
    parser.add_argument("--out", default="sampler.csv", help="the CSV to write")
    args = parser.parse_args()
    rows = [("sampler", "steps", "w1", "w1_floor", "spread")]
    for row in compare(args.run, args.states, args.samples, args.steps):
        print("{:8} {:5} {:>8} {:>8} {:>8}".format(*row), flush=True)
        rows.append(row)
    with open(args.out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
