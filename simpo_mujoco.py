"""SiMPO on MuJoCo: online RL of a diffusion policy by signed reweighted matching (Table 2).

    python simpo_mujoco.py --env-id Hopper-v4 --neg-clip -0.05
    python simpo_mujoco.py --resume runs/NAME       # after an interruption of any kind
    python simpo_mujoco.py --evaluate runs/NAME --capture-video

Paper: arXiv 2603.10250, Algorithm 1, section 5.2, Table 4. Copy this file and common.py to use it.
One iteration steps the environments once, fits the critics to one batch and, every second time,
draws N actions at the batch's states from an older copy of the policy, weights them by their
values and refits the policy to them, eq. (7). Diffusion time t counts T noise levels upwards:
    a_t = alpha_t a0 + sigma_t noise,    velocity = alpha_t noise - sigma_t a0
Shapes: B states of a batch, N samples a state, o observation, d action, E environments, H units.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
    # XLA threads one CPU device badly: make one device a core and split each batch over them.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    device_count = f"--xla_force_host_platform_device_count={cores}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {device_count}"

import gymnasium as gym
import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam

FAST = "--sampler dpm2 --sampling-steps 6 --num-samples 8"  # the README's setting for a CPU
EVAL_SEED = 2**31  # of the first evaluation episode; training uses smaller ones
EPISODE_LIMIT = 10_000  # steps of an evaluation episode that nothing else ends
LOG_EVERY = 400  # updates between two readings of the metrics, which wait for the device


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium id; module:Name-v0 is looked for in the working directory
    seed: int = 1
    # weights of the samples
    weighting: Literal["exp", "linear", "square", "power", "qvpo", "wd1"] = "linear"  # g in eq. (9)
    neg_clip: float = 0.0  # l in eq. (11): smallest weight; 0 keeps w >= 0, Lin. Neg. is -0.05
    eps_kl: float | None = None  # nats, eq. (30); default 43 % of log N: the paper's 1.5 at N = 32
    power: float = 1.5  # p of --weighting power: w = sign(y) |y|^p
    # diffusion policy
    num_samples: int = 32  # N, weighted samples a state
    diffusion_steps: int = 20  # T, noise levels
    sampling_steps: int = 20  # noise levels that the sampler visits, each a call of the network
    sampler: Literal["ddpm", "posterior", "ddim", "dpm2"] = "ddpm"  # see sampler_steps
    old_policy_every: int = 250  # updates between two copies of the policy to the sampled one
    target_samples: int = 4  # M: the critics' target takes the best of M next actions
    act_samples: int = 8  # the action taken is the best of so many; an evaluation's, of N
    act_noise: float = 0.0  # std of Gaussian noise on actions taken and in targets; range [-1, 1]
    sample_noise: float = 0.2  # std of Gaussian noise on the weighted samples
    error_bound: float = 5.0  # largest squared error of one action dimension in the matching loss
    weight_by: Literal["mean", "min"] = "mean"  # of both critics, the value that weights a sample
    # optimisation
    policy_lr: float = 3e-4  # at the first update, then linearly to
    policy_lr_end: float = 3e-5  # at the last one
    critic_lr: float = 3e-4
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate at which the target critics follow
    reward_scale: float = 0.2
    batch_size: int = 256  # B
    policy_delay: int = 2  # updates of the critics for one of the policy
    hidden_dim: int = 256  # H, units of each of the 3 hidden layers of every network
    # run
    total_timesteps: int = 1_000_000  # environment steps, over all environments
    learning_starts: int | None = None  # random steps before; default 30_000 or a tenth of the run
    num_envs: int = 5  # environments; one update for each step of all of them
    buffer_size: int = 1_000_000  # the most recent transitions, which batches are drawn from
    eval_every: int = 50_000  # environment steps between evaluations
    eval_episodes: int = 20  # run at once, from the same starts every time
    checkpoint_every: int = 25_000  # environment steps; new episodes begin at each checkpoint
    capture_video: bool = False  # film the first episode of every evaluation
    track: bool = False  # mirror the TensorBoard log to Weights & Biases
    run_dir: str | None = None  # default: runs/{env_id}__simpo_mujoco__{seed}__{time}
    resume: str | None = None  # run folder to continue with its own flags
    evaluate: str | None = None  # run folder to evaluate instead of training

    def __post_init__(self):
        if self.eps_kl is None and self.num_samples > 1:
            bound = 1.5 / math.log(32) * math.log(self.num_samples)
            object.__setattr__(self, "eps_kl", round(bound, 6))
        if self.learning_starts is None:
            object.__setattr__(self, "learning_starts", min(30_000, self.total_timesteps // 10))
        n, log_n = self.num_samples, math.log(max(self.num_samples, 1))
        counts = "diffusion_steps old_policy_every target_samples act_samples batch_size eval_every"
        counts += " policy_delay hidden_dim total_timesteps num_envs eval_episodes checkpoint_every"
        floats = [x for x in vars(self).values() if isinstance(x, float)]
        for ok, rule in (  # tyro prints a ValueError as an error of usage
            (all(getattr(self, x) >= 1 for x in counts.split()), f"at least 1: {counts}"),
            (not any(map(math.isnan, floats)), "a value is nan"),
            (0 <= self.seed < 2**31, "--seed must be in [0, 2^31)"),
            (n > 1, "--num-samples must be at least 2, for weights to compare"),
            (n < 2 or 0 < self.eps_kl < log_n, f"--eps-kl must be in (0, log N = {log_n:.3f})"),
            (self.neg_clip <= 0, "--neg-clip must be at most 0"),
            (not self.neg_clip or self.weighting in POWERS, f"--neg-clip is for {POWERS}"),
            (self.power > 0 and self.error_bound > 0, "--power and --error-bound must be above 0"),
            (1 <= self.sampling_steps <= self.diffusion_steps, "--sampling-steps: 1 to T"),
            (min(self.act_noise, self.sample_noise) >= 0, "noise must be at least 0"),
            (min(self.policy_lr, self.critic_lr) > 0, "learning rates must be above 0"),
            (0 <= self.policy_lr_end <= self.policy_lr, "--policy-lr-end: 0 to --policy-lr"),
            (0 <= self.gamma <= 1 and 0 < self.tau <= 1, "--gamma and --tau must be in [0, 1]"),
            (self.reward_scale > 0, "--reward-scale must be above 0"),
            (self.batch_size <= self.learning_starts, "--batch-size exceeds --learning-starts"),
            (self.batch_size <= self.buffer_size, "--batch-size exceeds --buffer-size"),
            (self.checkpoint_every <= self.buffer_size, "--checkpoint-every exceeds --buffer-size"),
            (self.num_updates > 0, "--learning-starts or --num-envs leaves no update"),
            (not (self.resume and self.evaluate), "--resume and --evaluate exclude each other"),
            ("://" not in f"{self.run_dir}", "--run-dir must be a local folder"),
        ):
            if not ok:
                raise ValueError(rule)

    @property
    def num_updates(self):
        """Updates of the critics in the whole run: 194,000 by default, for the paper's 200,000."""
        last, first = (-(-x // self.num_envs) for x in (self.total_timesteps, self.learning_starts))
        return last - first


POWERS = ("linear", "square", "power")  # weightings that eq. (11) can clip


# ---- networks ----------------------------------------------------------------------------------


@jax.checkpoint  # the backward pass computes it again: it is memory-bound on a CPU
def mish(x):
    """x tanh(softplus(x)), with one exp and one division."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def init_mlp(key, sizes):
    """[{"w": [in, out], "b": [out]}, ...]: truncated normal of variance 1 / in, and zeros."""
    init, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(sizes) - 1)
    shapes = zip(sizes[:-1], sizes[1:], strict=True)
    return [
        {"w": init(k, shape), "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def dense(layer, x):
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def mlp(layers, x):
    """Mish between layers, none after the last: x [..., in] -> [..., out]."""
    for layer in layers[:-1]:
        x = mish(dense(layer, x))
    return dense(layers[-1], x)


def q_values(critics, obs, act):
    """Both critics: obs [B, o], act [B, N, d] -> [2, B, N]."""

    def q_value(net):
        w_obs, w_act = jnp.split(net[0]["w"], [obs.shape[-1]])  # obs @ w_obs: once, not N times
        first = dense({"w": w_obs, "b": net[0]["b"]}, obs)[:, None] + act @ w_act
        return mlp(net[1:], mish(first))[..., 0]

    return jnp.stack([q_value(net) for net in critics])


def policy_velocity(theta, obs, num_levels):
    """The policy network at fixed states: obs [B, o] -> velocity(a_t [B, N, d], t) [B, N, d].

    It sees [obs | a_t | embedding of t]. The first layer's products with obs and with the T
    embeddings are computed here, once for all samples and noise levels; t is int, [] or [B, N].
    """
    first, *rest = theta["net"]
    o, d = obs.shape[-1], rest[-1]["b"].shape[0]
    w_obs, w_act, w_time = jnp.split(first["w"], [o, o + d])
    obs_part = dense({"w": w_obs, "b": first["b"]}, obs)[:, None]  # [B, 1, H]
    frequency = 10_000.0 ** -jnp.linspace(0, 1, 8)
    phase = jnp.outer(jnp.arange(1.0, num_levels + 1), frequency)
    embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)  # [T, 16]
    time_part = mlp(theta["time"], embedding) @ w_time  # [T, H]

    def velocity(a_t, t):
        at_t = jnp.broadcast_to(time_part[t], (*a_t.shape[:-1], time_part.shape[-1]))
        return mlp(rest, mish(obs_part + a_t @ w_act + at_t))

    return velocity


# ---- diffusion ---------------------------------------------------------------------------------


def cosine_alpha_bar(num_levels):
    """Table 4: alpha_t^2 = 1 - sigma_t^2 at the T levels, falling (Nichol and Dhariwal, eq. 17)."""
    f = np.cos((np.arange(num_levels + 1) / num_levels + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


class SamplerSteps(NamedTuple):
    """The levels that a sampler visits, upwards, each [S], and its step down from each of them:
    a_next = coef_a0 a0 + coef_last (a0 predicted one level above) + coef_at a_t + std noise."""

    t: np.ndarray  # index of the level among T
    alpha: np.ndarray
    sigma: np.ndarray
    coef_a0: np.ndarray
    coef_last: np.ndarray  # not 0 for dpm2 alone
    coef_at: np.ndarray
    std: np.ndarray  # 0 for ddim and dpm2


def sampler_steps(sampler, num_levels, num_visited):
    """-> SamplerSteps. Levels are denser at low noise, where actions get their final spread.

    ddpm: ancestral with variance beta_t, none in the last step. posterior: the smaller variance of
    Ho et al. (2006.11239), eq. 7. ddim: Song et al. (2010.02502), eq. 12 with sigma = 0. dpm2:
    DPM-Solver++(2M), Lu et al. (2211.01095), Algorithm 2; good with six steps.
    """
    i = np.arange(num_visited)
    t = np.round((num_levels - 1) * (i / max(num_visited - 1, 1)) ** 1.5).astype(np.int32)
    t = np.maximum.accumulate(t - i) + i if num_visited > 1 else t + num_levels - 1  # none twice
    bar = cosine_alpha_bar(num_levels)[t]
    bar_next = np.append(1.0, bar[:-1])
    alpha, sigma, std, extrapolate = np.sqrt(bar), np.sqrt(1 - bar), 0 * bar, 0 * bar
    beta = 1 - bar / bar_next
    posterior = beta * (1 - bar_next) / (1 - bar) if sampler in ("ddpm", "posterior") else 0 * bar
    coef_at = np.sqrt(1 - bar_next - posterior) / sigma
    if sampler == "ddpm":
        std[1:] = np.sqrt(beta[1:])
    if sampler == "posterior":
        std = np.sqrt(posterior)
    if sampler == "dpm2":
        h = -np.diff(np.log(alpha / sigma))
        extrapolate[1:-1] = h[:-1] / h[1:] / 2  # the first step and the last are ddim's
    gain = np.sqrt(bar_next) - alpha * coef_at
    rows = (alpha, sigma, (1 + extrapolate) * gain, -extrapolate * gain, coef_at, std)
    return SamplerSteps(t, *(row.astype(np.float32) for row in rows))


def sample_actions(args, theta, obs, num_samples, key):
    """Samples of the policy: obs [B, o] -> a0 [B, N, d] in [-1, 1]."""
    velocity = policy_velocity(theta, obs, args.diffusion_steps)
    shape = len(obs), num_samples, theta["net"][-1]["b"].shape[0]
    k_start, k_steps = jax.random.split(key)

    def denoise(carry, level):
        (a_t, last_a0), (i, at) = carry, level
        a0 = jnp.clip(at.alpha * a_t - at.sigma * velocity(a_t, at.t), -1, 1)
        a_t = at.coef_a0 * a0 + at.coef_last * last_a0 + at.coef_at * a_t
        if args.sampler in ("ddpm", "posterior"):
            a_t += at.std * jax.random.normal(jax.random.fold_in(k_steps, i), shape)
        return (a_t, a0), None

    start = jax.random.normal(k_start, shape), jnp.zeros(shape)
    steps = sampler_steps(args.sampler, args.diffusion_steps, args.sampling_steps)
    levels = np.arange(args.sampling_steps), steps
    (a_t, _), _ = jax.lax.scan(denoise, start, levels, reverse=True)
    return jnp.clip(a_t, -1, 1)


# ---- weights -----------------------------------------------------------------------------------


def weights(args, q, lam):
    """w [B, N] of eq. (9) from q [B, N] and lam [], both in reward units; carries no gradient.

    Mean 1 over N for exp and the powers, 0 for wd1, any for qvpo.
    """
    n, q = q.shape[-1], jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "exp":  # Example 3.1
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "qvpo":  # Example 3.2, but w = y as in Table 1: relu(q - mean q) / 0.5
        return jax.nn.relu(q - jnp.mean(q, axis=-1, keepdims=True)) / 0.5
    if args.weighting == "wd1":  # Example 3.4
        advantage = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        return n * (jax.nn.softmax(advantage, axis=-1) - jax.nn.softmax(-advantage, axis=-1))
    power = {"linear": 1, "square": 2, "power": args.power}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    # differs from paper: eq. (11) clips the linear weight alone
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)


# ---- update ------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training changes on the device."""

    theta: dict  # policy: its "net", and "time", the embedding of t
    theta_old: dict  # pi_old of Algorithm 1, which the weighted samples come from
    critics: list  # two networks
    critics_target: list
    theta_opt: optax.OptState
    critics_opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # updates of the critics so far


def optimisers(args):
    """Adam for the policy, its rate annealed over the run (Table 4), and for the critics."""
    last = -(-args.num_updates // args.policy_delay) - 1  # the policy's updates count from 0
    policy_lr = optax.linear_schedule(args.policy_lr, args.policy_lr_end, max(last, 1))
    return optax.adam(policy_lr), optax.adam(args.critic_lr)


def init_state(args, obs_dim, act_dim, key):
    """Fresh networks of Table 4 for o observations and d actions."""
    k_net, k_time, *k_critics = jax.random.split(key, 4)
    hidden, embedding = [args.hidden_dim] * 3, 16
    net = init_mlp(k_net, [obs_dim + act_dim + embedding, *hidden, act_dim])
    theta = {"net": net, "time": init_mlp(k_time, [embedding, 2 * embedding, embedding])}
    critics = [init_mlp(k, [obs_dim + act_dim, *hidden, 1]) for k in k_critics]
    copies = jax.tree.map(jnp.copy, (theta, critics))  # donated buffers must not be shared
    opts = [adam.init(x) for adam, x in zip(optimisers(args), (theta, critics), strict=True)]
    zero = jnp.zeros((), jnp.int32)
    return State(theta, copies[0], critics, copies[1], *opts, jnp.zeros(()), zero)


def choose_actions(args, theta, critics, obs, num, noise, key):
    """The best of num samples by the smaller critic, with noise: obs [B, o] -> [B, d]."""
    k_sample, k_noise = jax.random.split(key)
    a0 = sample_actions(args, theta, obs, num, k_sample)
    best = jnp.argmax(q_values(critics, obs, a0).min(axis=0), axis=-1) if num > 1 else None
    a0 = a0[:, 0] if num == 1 else jnp.take_along_axis(a0, best[:, None, None], axis=1)[:, 0]
    return jnp.clip(a0 + noise * jax.random.normal(k_noise, a0.shape), -1, 1) if noise else a0


def critic_loss(critics, obs, act, target):
    """Squared error, summed over both critics: obs [B, o], act [B, d], target [B]."""
    q = q_values(critics, obs, act[:, None])[..., 0]
    return jnp.mean((q - target) ** 2, axis=-1).sum(), q


def matching_loss(theta, args, obs, a0, w, key):
    """Reweighted matching, eq. (7), at uniform t: obs [B, o], a0 [B, N, d], w [B, N].

    A negative weight pushes a squared error up to error_bound and no further.
    """
    k_t, k_noise = jax.random.split(key)
    t = jax.random.randint(k_t, w.shape, 0, args.diffusion_steps)
    alpha_bar = jnp.asarray(cosine_alpha_bar(args.diffusion_steps), jnp.float32)[t][..., None]
    alpha, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    noise = jax.random.normal(k_noise, a0.shape)
    velocity = policy_velocity(theta, obs, args.diffusion_steps)(alpha * a0 + sigma * noise, t)
    error = (velocity - (alpha * noise - sigma * a0)) ** 2
    return jnp.mean(w * jnp.sum(jnp.minimum(error, args.error_bound), axis=-1))


def update_policy(args, state, obs, key):
    """Samples of pi_old, their weights, lam by its dual, and matching: -> state, metrics."""
    k_sample, k_noise, k_loss = jax.random.split(key, 3)
    a0 = sample_actions(args, state.theta_old, obs, args.num_samples, k_sample)
    spread = a0.std(axis=1).mean()
    a0 += args.sample_noise * jax.random.normal(k_noise, a0.shape)
    q = q_values(state.critics, obs, a0)  # [2, B, N]
    q = q.mean(axis=0) if args.weight_by == "mean" else q.min(axis=0)
    w = weights(args, q, jnp.exp(state.log_lam))
    log_lam, kl = update_lam(state.log_lam, q, args.eps_kl)
    loss, grads = jax.value_and_grad(matching_loss)(state.theta, args, obs, a0, w, k_loss)
    updates, theta_opt = optimisers(args)[0].update(grads, state.theta_opt)
    theta = optax.apply_updates(state.theta, updates)
    ess = jnp.sum(jnp.abs(w), axis=-1) ** 2 / jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    metrics = {"policy_loss": loss, "policy_grad_norm": optax.tree.norm(grads), "kl": kl}
    metrics |= {"lam": jnp.exp(log_lam), "ess": ess.mean(), "spread": spread}
    metrics |= {"w_max": w.max(), "w_negative": jnp.mean(w < 0)}
    return state._replace(theta=theta, theta_opt=theta_opt, log_lam=log_lam), metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(args, with_policy, state, batch, key):
    """One iteration of Algorithm 1 on replay rows [B, 2 o + d + 2] -> state, metrics {name: []}.

    `state` is donated: its arrays must not be used afterwards.
    """
    d = state.theta["net"][-1]["b"].shape[0]
    o = (batch.shape[-1] - d - 2) // 2
    obs, next_obs, act, rest = jnp.split(batch, [o, 2 * o, 2 * o + d], axis=-1)
    reward, terminated = args.reward_scale * rest[:, 0], rest[:, 1]
    k_target, k_policy = jax.random.split(jax.random.fold_in(key, state.step))

    next_act = choose_actions(
        args, state.theta, state.critics, next_obs, args.target_samples, args.act_noise, k_target
    )
    next_q = q_values(state.critics_target, next_obs, next_act[:, None]).min(axis=0)[:, 0]
    target = reward + args.gamma * (1 - terminated) * next_q
    loss_and_grad = jax.value_and_grad(critic_loss, has_aux=True)
    (loss, q), grads = loss_and_grad(state.critics, obs, act, target)
    updates, critics_opt = optimisers(args)[1].update(grads, state.critics_opt)
    critics = optax.apply_updates(state.critics, updates)
    critics_target = optax.incremental_update(critics, state.critics_target, args.tau)
    metrics = {"q_target": target.mean(), "q": q.mean(), "critic_loss": loss}
    metrics |= {"critic_grad_norm": optax.tree.norm(grads)}

    renew = state.step % args.old_policy_every == 0
    theta_old = jax.tree.map(lambda x, y: jnp.where(renew, x, y), state.theta, state.theta_old)
    new = {"critics": critics, "critics_target": critics_target, "critics_opt": critics_opt}
    state = state._replace(theta_old=theta_old, step=state.step + 1, **new)
    if with_policy:
        state, policy_metrics = update_policy(args, state, obs, k_policy)
        metrics |= policy_metrics
    return state, metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def act(args, explore, theta, critics, obs, key, step):
    """Actions to take, or those of an evaluation: obs [E, o] -> [E, d] in [-1, 1]."""
    num, noise = (args.act_samples, args.act_noise) if explore else (args.num_samples, 0.0)
    return choose_actions(args, theta, critics, obs, num, noise, jax.random.fold_in(key, step))


# ---- environments and replay -------------------------------------------------------------------


class CutOff(gym.Wrapper):
    """Truncates an episode whose simulation blew up: MuJoCo then starts again without a word, and
    only its clock tells. The last sane state follows itself with reward 0, and bootstraps."""

    def reset(self, *, seed=None, options=None):
        self.obs, info = self.env.reset(seed=seed, options=options)
        return self.obs, info

    def step(self, action):
        before = self.env.unwrapped.data.time
        obs, *rest = self.env.step(action)
        if self.env.unwrapped.data.time <= before:
            print("warning: episode cut off: the simulation is unstable", file=sys.stderr)
            return self.obs, 0.0, False, True, {}
        self.obs = obs
        return obs, *rest


def make_env(args, film=False):
    """The environment --env-id, by itself; one to be filmed is drawn without shadows, which is 20
    times faster where there is no GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*out of date|.*X11|.*GLFW")  # v4 is the paper's
        kwargs = {"render_mode": "rgb_array"} if film else {}
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
    if not hasattr(env.unwrapped, "mujoco_renderer"):
        return env
    if film:
        model = env.unwrapped.model
        model.vis.quality.shadowsize, model.vis.quality.offsamples = 0, 0
        model.mat_reflectance[:] = 0
    return CutOff(env)


class Envs:
    """E environments stepped one after the other, with actions in [-1, 1]. What they return is
    checked and copied to float32 at once: an environment may reuse its arrays."""

    def __init__(self, args, num_envs, evaluation=False):
        try:
            films = [args.capture_video and evaluation] + [False] * (num_envs - 1)
            self.envs = [make_env(args, film) for film in films]
        except (gym.error.Error, ImportError, TypeError, ValueError) as error:
            fail(f"cannot make {args.env_id}: {error}")
        obs, act = self.envs[0].observation_space, self.envs[0].action_space
        flat = all(isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (obs, act))
        if not (flat and act.shape[0] and np.issubdtype(act.dtype, np.floating)):
            hint = "gymnasium.wrappers.FlattenObservation makes other observations so"
            fail(f"observations and actions must be flat and real, not {obs}, {act}; {hint}")
        if not act.is_bounded() or np.abs([act.low, act.high]).max() >= 1e10:  # dm_control's inf
            fail(f"actions must be bounded, not {act}")
        self.obs_shape, self.low, self.high = obs.shape, act.low, act.high
        self.kind, self.steps = "evaluation" if evaluation else "training", 0

    def read(self, i, name, value, shape):
        """A float32 copy of what environment i returned; ends the run if it is none."""
        with np.errstate(over="ignore"):
            value = np.array(value, np.float32)
        where = f"of environment {i} at {self.kind} step {self.steps}"
        if value.shape != shape and (shape or value.size != 1):  # a reward may be [1]
            fail(f"{name} {where} has shape {value.shape}, not {shape}", 1)
        if not np.isfinite(value).all():
            fail(f"{name} {where} is not finite in float32", 1)
        return value.reshape(shape)

    def reset(self, i, seed=None):
        obs, _ = self.envs[i].reset(seed=seed)
        return self.read(i, "first observation", obs, self.obs_shape)

    def reset_all(self, seeds):
        self.obs = np.stack([self.reset(i, int(seed)) for i, seed in enumerate(seeds)])

    def step(self, a0):
        """a0 [E, d] -> next_obs [E, o], reward, terminated and ended [E]. `obs` [E, o] is what to
        act on then: next_obs, or the first observation of a new episode where one ended."""
        self.steps += len(self.envs)
        action = self.low + (a0.astype(self.low.dtype) + 1) / 2 * (self.high - self.low)
        action, rows, obs = np.clip(action, self.low, self.high), [], []
        for i, env in enumerate(self.envs):
            self.read(i, "action", action[i], self.low.shape)
            next_obs, reward, terminated, truncated, _ = env.step(action[i])
            reward = self.read(i, "reward", reward, ())
            next_obs = self.read(i, "observation", next_obs, self.obs_shape)
            ended = bool(terminated or truncated)
            rows.append((next_obs, reward, bool(terminated), ended))
            obs.append(self.reset(i) if ended else next_obs)
        self.obs = np.stack(obs)
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    def close(self):
        for env in self.envs:
            env.close()


class Replay:
    """The last buffer_size transitions [obs | next_obs | act | reward | terminated], in a file.

    The ring is twice as long, so that a resumed run finds every row it may still sample.
    """

    def __init__(self, args, path, width, written):
        shape = min(2 * args.buffer_size, args.total_timesteps + args.num_envs), width
        size = 4 * math.prod(shape)
        try:
            with path.open("r+b" if written else "w+b") as file:
                if written and path.stat().st_size != size:
                    fail(f"{path} does not fit the checkpoint")
                if hasattr(os, "posix_fallocate"):  # a disk too full is known now, not in hours
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            fail(f"the replay takes {size / 1e9:.2f} GB in {path}: {error.strerror}")
        self.rows = np.memmap(path, np.float32, "r+", shape=shape)
        self.limit, self.written = args.buffer_size, written

    def add(self, *columns):
        """One row for each environment; columns are [E, .] or [E]."""
        rows = np.concatenate([x.reshape(len(x), -1) for x in columns], axis=1)
        self.rows[(self.written + np.arange(len(rows))) % len(self.rows)] = rows
        self.written += len(rows)

    def sample(self, rng, batch_size):
        """Uniform with replacement -> [B, 2 o + d + 2]."""
        age = rng.integers(min(self.written, self.limit), size=batch_size)
        return self.rows[(self.written - 1 - age) % len(self.rows)]


# ---- evaluation and checkpoints ----------------------------------------------------------------


def evaluate(args, envs, state, key, step, film_path, stop=()):
    """An episode of each environment, best of N, the same starts every time, the first one filmed.

    -> rows [E, 4] of eval.csv: step, episode, return, length; None once `stop` is not empty.
    """
    numpy_state = np.random.get_state()  # some environments draw from numpy's global generator
    np.random.seed(EVAL_SEED)
    envs.reset_all(EVAL_SEED + np.arange(len(envs.envs)))
    rows, running = np.zeros((len(envs.envs), 4)), np.ones(len(envs.envs), bool)
    rows[:, 0], rows[:, 1] = step, np.arange(len(rows))
    film = open_film(film_path, envs.envs[0]) if args.capture_video else None
    for t in range(EPISODE_LIMIT):
        if film and running[0]:
            film = add_frame(film, envs.envs[0])
        a0 = act(args, False, state.theta, state.critics, envs.obs, key, t)
        _, reward, _, ended = envs.step(np.asarray(a0))
        rows[running, 2:] += np.column_stack([reward, np.ones(len(rows))])[running]
        running &= ~ended
        if stop or not running.any():
            break
    if film:
        film.close()
    np.random.set_state(numpy_state)
    return None if stop else rows


def write_rows(path, rows):
    temporary, header = path.with_suffix(".tmp"), "step,episode,return,length"
    np.savetxt(temporary, rows, "%d,%d,%.6f,%d", header=header, comments="")
    temporary.replace(path)


def summary(rows):
    mean, std = rows[:, 2].mean(), rows[:, 2].std()
    return f"return {mean:.1f} +- {std:.1f} (std over {len(rows)} episodes)"


def open_film(path, env):
    path.parent.mkdir(exist_ok=True)
    return imageio.get_writer(path, fps=env.metadata.get("render_fps", 30))


def add_frame(film, env):
    """-> film, or None and a warning: no driver or encoder may end a training run."""
    try:
        film.append_data(env.render())
        return film
    except Exception as error:
        print(f"warning: no film: {error}", file=sys.stderr)


def named_leaves(tree):
    """{name: array}, as a checkpoint holds a pytree."""
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def save(path, state, step):
    """Plain arrays, atomically: a run killed while it saves keeps its last checkpoint."""
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **jax.device_get(named_leaves(state)), env_step=step)
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load(path, template):
    """-> state with the tree and shapes of `template`, environment step."""
    try:
        with np.load(path) as file:
            arrays, step = {name: file[name] for name in named_leaves(template)}, file["env_step"]
        for name, like in named_leaves(template).items():
            if (arrays[name].shape, arrays[name].dtype) != (like.shape, like.dtype):
                raise ValueError(f"{name} has another shape")
        return jax.tree.unflatten(jax.tree.structure(template), arrays.values()), int(step)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        fail(f"no usable checkpoint in {path}: {error}")


# ---- main --------------------------------------------------------------------------------------


def fail(message, code=2):
    """One line, and an exit code: 2 for bad usage, 1 for a run that cannot go on."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def parse_args():
    """-> args, and the folder of --resume or --evaluate, whose flags are then the defaults."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head
    args = tyro.cli(Args)
    if not (folder := args.resume or args.evaluate):
        return args, None
    try:
        saved = Args(**json.loads((Path(folder) / "args.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        fail(f"{folder} is no run folder: {error}")
    args = tyro.cli(Args, default=saved)
    free = "resume evaluate capture_video track eval_every eval_episodes checkpoint_every".split()
    for name, value in vars(saved).items():
        if getattr(args, name) != value and name not in free:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} must stay {value}, which the run and its schedules depend on")
    if not os.access(folder, os.W_OK):
        fail(f"{folder} is read-only")
    return args, Path(folder)


def create_run_dir(args):
    """A folder that no other run has, with args.json and versions.json."""
    name = f"{args.env_id}__simpo_mujoco__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    path = args.run_dir or "runs/" + re.sub(r"[^\w.-]", "-", name)
    versions = {x: version(x) for x in ("jax", "optax", "numpy", "gymnasium", "mujoco")}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git
        versions["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        run_dir = Path(path + suffix)
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
            (run_dir / "versions.json").write_text(json.dumps(versions, indent=2))
            return run_dir
        except OSError as error:
            if args.run_dir or not isinstance(error, FileExistsError):
                fail(f"--run-dir {run_dir}: {error.strerror}; --resume goes on with a run")


def watch_signals():
    """The list to which SIGINT and SIGTERM add their number; a second one ends the program."""
    received = []

    def note(signum, _):
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)
        os.write(2, b"\nstopping after this step; once more ends it at once\n")

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return received


def open_log(args, run_dir, step):
    """TensorBoard writer, mirrored to Weights & Biases with --track."""
    if args.track:
        import wandb

        run = {"id": run_dir.name, "name": run_dir.name, "resume": "allow", "config": vars(args)}
        wandb.init(project="simpo", sync_tensorboard=True, **run)
    log = SummaryWriter(str(run_dir), purge_step=step + 1)
    log.add_text("args", "\n".join(f"    {name}: {x}" for name, x in vars(args).items()))
    return log


def log_metrics(log, metrics, step):
    """One update's metrics; the first of them, in order of computation, to be off ends the run."""
    metrics = {name: float(value) for name, value in metrics.items()}
    for name, value in metrics.items():
        log.add_scalar(f"losses/{name}", value, step)
    for name, value in metrics.items():
        if not math.isfinite(value) or name.endswith("grad_norm") and value > 1e6:
            fail(f"diverged: {name} is {value:.3g} at step {step}", 1)


def train(args, run_dir, envs, state, keys, step, stop):
    """The loop of Algorithm 1, until the last step or a signal.

    At each checkpoint new episodes begin and the generator is seeded anew, as in a run resumed from
    there, so that the two are equal bit for bit.
    """
    k_act, k_update, k_eval = keys
    devices = jax.devices()  # a batch is split over all cores, or stays on one GPU
    count = math.gcd(len(devices), args.batch_size) if devices[0].platform == "cpu" else 1
    mesh = jax.sharding.Mesh(np.array(devices[:count]), ("batch",))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    print(f"run folder {run_dir}, on {count} x {devices[0].device_kind}", flush=True)

    width = 2 * envs.obs_shape[0] + len(envs.low) + 2
    replay, log = Replay(args, run_dir / "replay.dat", width, step), open_log(args, run_dir, step)
    evals = np.zeros((0, 4))
    if step:
        evals = np.loadtxt(run_dir / "eval.csv", delimiter=",", skiprows=1, ndmin=2)
        evals = evals[evals[:, 0] < step]
    start = updates = int(state.step)
    bar, sps, checkpoint_due, clock, logged = tqdm(disable=True), None, True, time.time(), step
    while True:
        paused, done = time.time(), step >= args.total_timesteps
        if checkpoint_due or stop or done:
            replay.rows.flush()
            save(run_dir / "checkpoint.npz", state, step)
            if stop:
                sys.exit(128 + stop[0])
            rng = np.random.default_rng([args.seed, step])
            np.random.seed(rng.integers(2**31))
            envs.reset_all(rng.integers(EVAL_SEED, size=args.num_envs))
            envs.steps, returns, lengths = step, np.zeros(args.num_envs), np.zeros(args.num_envs)
        if step % args.eval_every < args.num_envs or done:
            with contextlib.closing(Envs(args, args.eval_episodes, evaluation=True)) as others:
                film = run_dir / "videos" / f"step-{step}.mp4"
                rows = evaluate(args, others, state, k_eval, step, film, stop)
            if stop:
                continue
            evals = np.concatenate([evals, rows])
            write_rows(run_dir / "eval.csv", evals)
            log.add_scalar("charts/eval_return", rows[:, 2].mean(), step)
            left = f", {(args.total_timesteps - step) / sps / 3600:.1f} hours left" if sps else ""
            bar.write(f"step {step}: {summary(rows)}{left}")
        if done:
            break
        clock += time.time() - paused

        # act and update; the device goes on with the update while the environments step
        obs, learning = envs.obs, step >= args.learning_starts
        if learning:
            if updates == start:
                bar.write("compiling, which takes a minute; Ctrl-C is answered after it")
            a0 = act(args, True, state.theta, state.critics, obs, k_act, step)
            batch = jax.device_put(replay.sample(rng, args.batch_size), split)
            with_policy = updates % args.policy_delay == 0
            state, metrics = update(args, with_policy, state, batch, k_update)
            updates, a0 = updates + 1, np.asarray(a0)
        else:
            a0 = rng.uniform(-1, 1, (args.num_envs, len(envs.low))).astype(np.float32)
        next_obs, reward, terminated, ended = envs.step(a0)
        replay.add(obs, next_obs, a0, reward, terminated)  # an end by truncation bootstraps
        step, returns, lengths = step + args.num_envs, returns + reward, lengths + 1
        for i in np.flatnonzero(ended):
            log.add_scalar("charts/episodic_return", returns[i], step)
            log.add_scalar("charts/episodic_length", lengths[i], step)
            returns[i] = lengths[i] = 0
        checkpoint_due = step % args.checkpoint_every < args.num_envs

        bar.update(args.num_envs)
        if learning and updates - start == args.policy_delay:  # all is compiled: the clock starts
            jax.block_until_ready(state)
            bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
            clock, logged = time.time(), step
        elif learning and with_policy and (updates - 1) % (LOG_EVERY * args.policy_delay) == 0:
            log_metrics(log, metrics, step)
            rate, clock, logged = (step - logged) / (time.time() - clock), time.time(), step
            log.add_scalar("charts/SPS", rate, step)
            if sps is None:
                hours = (args.total_timesteps - step) / rate / 3600
                slow = devices[0].platform == "cpu" and args.num_samples * args.sampling_steps > 99
                hint = f"; a tenth of the work: {FAST}" if slow else ""
                bar.write(f"{rate:.0f} steps a second, {hours:.1f} hours left{hint}")
            sps = rate
    bar.close()
    log.close()
    Path(replay.rows.filename).unlink()  # only a resumed run needs it


def main():
    sys.path.append(os.getcwd())  # for --env-id module:Name-v0
    jax.config.update("jax_enable_x64", False)
    args, run_dir = parse_args()
    if args.track and not find_spec("wandb"):
        fail("--track needs Weights & Biases: pip install wandb")
    if args.capture_video:
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
        try:
            with contextlib.closing(make_env(args, film=True)) as env:
                env.reset(seed=EVAL_SEED)
                env.render()
        except Exception as error:
            fail(f"--capture-video: {type(error).__name__}: {error}")
    stop, step = watch_signals(), 0
    num_envs = args.eval_episodes if args.evaluate else args.num_envs
    with contextlib.closing(Envs(args, num_envs, bool(args.evaluate))) as envs:
        k_init, *keys = jax.random.split(jax.random.key(args.seed), 4)
        state = init_state(args, *envs.obs_shape, *envs.low.shape, k_init)
        if args.evaluate:
            unused = ("theta_old", "critics_target", "theta_opt", "critics_opt", "log_lam")
            state = state._replace(**dict.fromkeys(unused))
        if run_dir:
            state, step = load(run_dir / "checkpoint.npz", state)
        if not args.evaluate:
            run_dir = run_dir or create_run_dir(args)
            return train(args, run_dir, envs, state, keys, step, stop)
        film = run_dir / "videos" / "evaluate.mp4"
        rows = evaluate(args, envs, state, keys[2], step, film, stop)
        if stop:
            sys.exit(128 + stop[0])
        write_rows(run_dir / "evaluate.csv", rows)
        print(f"step {step}: {summary(rows)}; {run_dir / 'evaluate.csv'}")
        if film.exists():
            print(f"film {film}")


if __name__ == "__main__":
    main()
