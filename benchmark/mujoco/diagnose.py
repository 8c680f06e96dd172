"""What the policy and the critics of a run are like, as a CSV.

    python -m benchmark.mujoco.diagnose runs/NAME > NAME.csv

Plays ten episodes as evaluations do. Of the steps of each fifth of them (`from_step`):
    q              the smaller critic at the actions taken
    followed       the discounted return that followed them, in scaled reward; of an
                   episode that was cut off it lacks the rest
Of every tenth state that was met, with 64 samples of pi_old, means over states:
    spread         standard deviation of the samples, in half action ranges
    q_std          standard deviation of the smaller critic over the samples
    disagreement   mean distance of the two critics
    agreement      correlation of the two critics over the samples: near 0 they rank
                   samples by chance
"""

from pathlib import Path

import jax
import numpy as np
import tyro

import simpo_mujoco as simpo

EPISODES = 10
FIFTHS = 5
SAMPLES = 64


def play(args, state, envs):
    """-> observations [t, E, o] and, as [t, E], q, rewards, whether an episode runs."""
    obs, _ = envs.reset(seed=simpo.EVAL_SEED)
    running = np.ones(EPISODES, bool)
    steps = []
    while running.any() and len(steps) < simpo.EVAL_STEPS:
        key = jax.random.key(1)
        a0 = simpo.best_action(args, state, obs, args.act_samples, key, len(steps))
        q = simpo.q_values(state.critics, obs, a0[:, None])  # [2, E, 1]
        q = q.min(axis=0)[:, 0]
        met = obs
        _, reward, _, ended, obs = simpo.step_envs(envs, np.asarray(a0))
        steps.append((met, np.asarray(q), reward, running))
        running = running & ~ended
    return [np.array(column) for column in zip(*steps, strict=True)]


def followed_returns(args, reward, running):
    """Discounted sums of what is left of each episode: [t, E] -> [t, E]."""
    sums = np.zeros_like(reward)
    tail = np.zeros(EPISODES)
    for t in reversed(range(len(reward))):
        tail = running[t] * (args.reward_scale * reward[t] + args.gamma * tail)
        sums[t] = tail
    return sums


def correlation(x, y):
    """Mean over states of the correlation over samples: x, y [B, N]."""
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    covariance = (x * y).mean(axis=1)
    scale = x.std(axis=1) * y.std(axis=1)
    return np.mean(covariance / np.maximum(scale, 1e-12))


def main(run: tyro.conf.Positional[Path]):
    jax.config.update("jax_default_matmul_precision", "float32")  # as in the trainer
    args = simpo.read_args(run)
    envs, obs_dim, act_dim = simpo.make_envs(args, EPISODES)
    state = simpo.init_state(args, obs_dim, act_dim, jax.random.key(0))
    state, step = simpo.load(run / "checkpoint.npz", state)
    obs, q, reward, running = play(args, state, envs)
    followed = followed_returns(args, reward, running)

    print("quantity,from_step,value")
    print(f"trained,,{step}")
    print(f"return,,{(reward * running).sum(axis=0).mean():.6g}")
    print(f"length,,{running.sum(axis=0).mean():.6g}")
    for part in np.array_split(np.arange(len(q)), FIFTHS):
        if running[part].any():
            print(f"q,{part[0]},{q[part][running[part]].mean():.4g}")
            print(f"followed,{part[0]},{followed[part][running[part]].mean():.4g}")

    met = obs[running][::10]
    key = jax.random.key(2)
    a0 = simpo.sample_actions(args, state.theta_old, met, SAMPLES, key)
    q = simpo.q_values(state.critics, met, a0)
    one, two = np.float64(q)
    print(f"spread,,{np.std(a0, axis=1).mean():.4g}")
    print(f"q_std,,{np.minimum(one, two).std(axis=1).mean():.4g}")
    print(f"disagreement,,{np.abs(one - two).mean():.4g}")
    print(f"agreement,,{correlation(one, two):.4g}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
