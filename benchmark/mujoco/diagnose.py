"""What the policy and the critics of a run are like, where its returns disappoint.

    python benchmark/mujoco/diagnose.py runs/NAME

Plays ten episodes as evaluations do and prints, of the steps of a 1st, 2nd ... fifth of them:
    q, true        the smaller critic at the action taken, and the discounted return that followed
                   in scaled reward (of an episode that was cut off it lacks the rest)
and of every tenth state that was met, with 64 samples of pi_old, means over states:
    spread         standard deviation of the samples, in half action ranges
    q_std          standard deviation of the smaller critic over the samples
    disagreement   mean distance of the two critics
    agreement      correlation of the two critics over the samples: near 0 they rank by chance
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

import simpo_mujoco as simpo

FIFTHS = 5


def load(folder):
    """-> args with ten environments, which are made too, and the State of a run."""
    try:
        args = simpo.Args(**json.loads((folder / "args.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        simpo.fail(f"{folder} is no run folder: {error}")
    args = dataclasses.replace(args, eval_episodes=10)
    envs = simpo.make_envs(args, evaluation=True)
    (o,), (d,) = envs.single_observation_space.shape, envs.single_action_space.shape
    state = simpo.init_state(args, o, d, jax.random.key(0))
    state = simpo.State(state.theta_old, state.critics, state.step)
    return args, envs, *simpo.load(folder / "checkpoint.npz", state)


def play(args, envs, state):
    """Of each step [t, E]: observations [t, E, o], q, rewards, whether the episode still runs."""
    (obs, _), running, steps = envs.reset(seed=2**31), np.ones(envs.num_envs, bool), []
    while running.any() and len(steps) < simpo.EPISODE_LIMIT:
        key, n = jax.random.key(1), args.num_samples
        a0 = np.asarray(simpo.best_action(args, state, obs, n, key, len(steps)))
        q = simpo.q_values(state.critics, obs, a0[:, None]).min(axis=0)[:, 0]
        next_obs, reward, terminated, truncated, _ = envs.step(a0)
        steps.append((obs, np.asarray(q), reward, running))
        obs, running = next_obs, running & ~(terminated | truncated)
    return map(np.array, zip(*steps, strict=True))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of simpo_mujoco.py")
    jax.config.update("jax_default_matmul_precision", "float32")  # as in the trainer
    args, envs, state, step = load(parser.parse_args().run)
    obs, q, reward, running = play(args, envs, state)
    true, tail = np.zeros_like(q), 0.0
    for t in reversed(range(len(q))):
        true[t] = tail = running[t] * (args.reward_scale * reward[t] + args.gamma * tail)
    returns, lengths = (reward * running).sum(axis=0), running.sum(axis=0)
    print(f"step {step}: return {returns.mean():.1f} +- {returns.std():.1f}, ", end="")
    print(f"length {lengths.mean():.0f}\n{'from step':>12} {'q':>8} {'true':>8}")
    for part in np.array_split(np.arange(len(q)), FIFTHS):
        if running[part].any():
            mean = (x[part][running[part]].mean() for x in (q, true))
            print("{:12} {:8.2f} {:8.2f}".format(part[0], *mean))
    met = obs[running][::10]
    a0 = simpo.sample_actions(args, state.theta_old, met, 64, jax.random.key(2))
    one, two = np.asarray(simpo.q_values(state.critics, met, a0), np.float64)
    centred = [x - x.mean(axis=1, keepdims=True) for x in (one, two)]
    scale = np.maximum(one.std(axis=1) * two.std(axis=1), 1e-12)
    for name, value in {
        "spread": np.std(a0, axis=1).mean(),
        "q_std": np.minimum(one, two).std(axis=1).mean(),
        "disagreement": np.abs(one - two).mean(),
        "agreement": (np.mean(centred[0] * centred[1], axis=1) / scale).mean(),
    }.items():
        print(f"{name:12} {value:8.3f}")


if __name__ == "__main__":
    main()
