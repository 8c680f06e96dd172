"""SiMPO on DeepMind Control: simpo_mujoco.py with the reward landscapes of figures 4 and 5.

    python simpo_dmc.py --domain cheetah --task run --reward exp

Paper: arXiv 2603.10250, Algorithm 1 and section 5.2. Copy this file and common.py; nothing else of
the repository is needed. Time runs from t = 0 (action) to t = 1 (noise), here at T discrete
levels t/T; a_t = alpha_t a0 + sigma_t noise and vel = alpha_t noise - sigma_t a0.
Legend: B states of a batch, N samples a state, o observation, d action, H hidden units, T levels.

Where the paper is silent, or we depart from it:
1. Gaussian noise is added to the action taken, to the action in the critic's target and to the
   samples that the policy is refitted to; else a policy refitted to its own samples collapses.
2. The clip of eq. (11) also applies to the signed powers sign(y) |y|^p ("Sqr. Neg.").
3. Actions taken and critic targets are the best of N samples by the smaller critic (as DPMD).
4. The N samples are drawn at the next states of the batch, so never at the first of an episode,
   and serve critic and policy alike.
5. lam follows its dual on a log scale, without the chain rule's factor lam.
6. Appendix F.2 prints rewards that fall with speed; ours rise, as its text says.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import deque
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

# One XLA device per core and the batch split over them: XLA threads a single CPU device badly.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    flag = f"--xla_force_host_platform_device_count={min(cores, 8)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from dm_control.rl.control import PhysicsError
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam

SCRIPT, ENV_FLAGS, DECIMALS = "simpo_dmc", "--domain, --task", 3  # of printed means
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "gymnasium", "mujoco", "dm_control")
TOP_SPEED = {"cheetah-run": 10.0, "walker-run": 8.0}  # v*, m/s: App. F.2, dm_control
EVAL_SEED = 2**63  # of the evaluation episodes; SeedSequence pads words, so that 2**32 is seed 0
GRAD_NORM_LIMIT = 1e6  # a run past it has diverged
EPISODE = {"return": "r", "length": "l", "stock_return": "stock_return", "speed": "speed"}
CHARTS = {f"episodic_{name}": statistic for name, statistic in EPISODE.items()}  # by tag
CHARTS["physics_errors"] = "physics_errors"
EVAL_CSV = {
    "fmt": "%d,%d,%.6f,%d" + ",%.6f" * (len(EPISODE) - 2),
    "header": ",".join(("step", "episode", *EPISODE)),
    "comments": "",
}
LOG_EVERY = 200  # updates of the policy between two reads of metrics; a read waits for the device


class UsageError(Exception):
    """Bad input. `main` prints it as one line and exits with code 2."""


class Diverged(Exception):
    """The run cannot go on: a quantity is not finite or has exploded."""


# ---- Args -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    # --- weighting ---
    weighting: Literal["exp", "linear", "square", "power", "qvpo", "wd1"] = "linear"
    """g in eq. (9): Table 1 (exp, linear, square, power), Example 3.2 (qvpo) or 3.4 (wd1)"""
    power: float | None = None
    """p of --weighting power, w = sign(y) |y|^p; alpha of Table 1 is 1 + 1/p"""
    neg_clip: float = 0.0
    """l in eq. (11), in units of w; 0 keeps w >= 0, the paper's Lin. Neg. is -0.05"""
    # --- run ---
    seed: int = 1
    """seed of the networks, environments, replay and noise"""
    num_seeds: int = 1
    """K, runs with seeds --seed to --seed + K - 1 as one program; for a GPU that one cannot fill"""
    run_dir: str | None = None
    """folder of this run; default runs/{env_id}__{script}__{seed}__{time}"""
    resume: str | None = None
    """run folder to go on with, bit for bit; takes its arguments from there"""
    evaluate: str | None = None
    """run folder to evaluate instead of training"""
    eval_every: int = 50_000
    """environment steps between two evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 20
    """episodes of one evaluation, run at once"""
    checkpoint_every: int = 25_000
    """environment steps between two checkpoints; 0 saves at the end and when stopped only"""
    num_devices: int | None = None
    """XLA devices that share a batch; default as many CPU devices as divide it, or one GPU"""
    capture_video: bool = False
    """write an mp4 of the first episode of every evaluation"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (pip install wandb tensorboard)"""
    # --- env ---
    domain: str = "cheetah"
    """domain of the DeepMind Control Suite"""
    task: str = "run"
    """task of that domain"""
    reward: Literal["stock", "sqrt", "linear", "square", "exp"] = "stock"
    """dm_control's own (stock), or one of Appendix F.2 for cheetah-run and walker-run"""
    num_envs: int = 5
    """parallel environments; one update for each step of all of them"""
    # --- lam ---
    eps_kl: float = 1.5
    """epsilon in eq. (30), nats: KL(softmax(q / lam) || uniform); below log N"""
    # --- diffusion ---
    num_samples: int = 32
    """N, samples a state"""
    diffusion_steps: int = 20
    """T, noise levels of the diffusion"""
    sampling_steps: int = 20
    """S, levels among the T that the sampler visits, each a call of the network"""
    sampler: Literal["ddpm", "ddim", "dpm2"] = "ddpm"
    """ancestral, DDIM or DPM-Solver++(2M); the last two are deterministic, for S below T"""
    noise_start: float = 0.3
    """std of the Gaussian noise on actions at the first update, in half action ranges"""
    noise_end: float = 0.1
    """the same after noise_steps; linear between"""
    noise_steps: int = 300_000
    """environment steps from noise_start to noise_end, counted from the first update"""
    train_noise: bool = True
    """add that noise to the samples the policy is refitted to as well"""
    policy_lr: float = 3e-4
    """Adam's rate for the policy at the first update"""
    policy_lr_end: float = 3e-5
    """the same at the last update; linear between"""
    # --- critic ---
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """rate at which the target critics follow"""
    critic_lr: float = 3e-4
    """Adam's rate for the critics"""
    reward_scale: float = 0.2
    """factor on rewards before the critics see them"""
    # --- budget ---
    total_timesteps: int = 1_000_000
    """environment steps over all environments"""
    learning_starts: int = 30_000
    """environment steps with uniform random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions in the replay, the most recent ones"""
    batch_size: int = 256
    """B, transitions an update"""
    policy_delay: int = 2
    """updates of the critics for one of the policy"""
    hidden_dim: int = 256
    """H, units of each of the 3 hidden layers of every network"""

    def __post_init__(self):
        log_n = math.log(max(self.num_samples, 1))
        clipped, power = ("linear", "square", "power"), self.weighting == "power"
        counts = "total_timesteps num_envs buffer_size batch_size eval_episodes noise_steps"
        for names, ok, rule in (
            ("seed", lambda x: 0 <= x < 2**32, "in [0, 2^32)"),
            (f"{counts} policy_delay hidden_dim diffusion_steps", lambda x: x >= 1, "at least 1"),
            ("num_seeds", lambda x: 1 <= x <= 2**32 - self.seed, "at least 1"),
            ("num_seeds", lambda x: x == 1 or not self.track, "1 with --track"),
            (
                "sampling_steps",
                lambda x: 1 <= x <= self.diffusion_steps,
                "in [1, T = --diffusion-steps]",
            ),
            ("eval_every checkpoint_every noise_start noise_end", lambda x: x >= 0, "at least 0"),
            ("policy_lr critic_lr reward_scale", lambda x: x > 0, "above 0"),
            ("policy_lr_end", lambda x: 0 <= x <= self.policy_lr, "in [0, --policy-lr]"),
            ("tau", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("gamma", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("num_samples", lambda x: x >= 2, "at least 2, for weights to compare"),
            ("eps_kl", lambda x: 0 < x < log_n, f"in (0, log N), log N = {log_n:.3f}"),
            ("neg_clip", lambda x: x <= 0, "at most 0"),
            ("neg_clip", lambda x: not x or self.weighting in clipped, f"0 for {self.weighting}"),
            ("power", lambda x: power == (x is not None), "set for --weighting power alone"),
            ("power", lambda x: x is None or x > 0, "above 0"),
            ("num_devices", lambda x: x is None or x >= 1, "at least 1"),
            ("batch_size", lambda x: x <= self.learning_starts, "at most --learning-starts"),
            ("batch_size", lambda x: x <= self.buffer_size, "at most --buffer-size"),
            ("learning_starts", lambda x: x < self.total_timesteps, "below --total-timesteps"),
            ("reward", lambda x: x == "stock" or self.env_id in TOP_SPEED, "stock for this task"),
            ("resume", lambda x: not (x and self.evaluate), "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not ok(value) or isinstance(value, float) and not math.isfinite(value):
                    raise UsageError(f"--{name.replace('_', '-')} must be {rule}, got {value}")

    env_id = property(lambda self: f"{self.domain}-{self.task}")

    @property
    def num_updates(self):
        """Updates of the critics in the whole run, for the schedules."""
        return -(-(self.total_timesteps - self.learning_starts) // self.num_envs)


# ---- networks ---------------------------------------------------------------------------------


@jax.checkpoint  # the backward pass keeps x alone; it is memory-bound on a CPU
def mish(x):
    """x tanh(softplus(x)) with one exp and one division; e^20 is inf for float32's purposes."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def init_mlp(key, sizes):
    """List of {"w" [in, out], "b" [out]}: truncated normal of variance 1/in, and zeros."""
    init = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(sizes[:-1], sizes[1:], strict=True)
    return [{"w": init(k, s), "b": jnp.zeros(s[1])} for k, s in zip(keys, shapes, strict=True)]


def dense(layer, x):
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def mlp(layers, x):
    """Mish between layers, none after the last. x [..., in] -> [..., out]."""
    for layer in layers[:-1]:
        x = mish(dense(layer, x))
    return dense(layers[-1], x)


def q_values(critics, obs, act):
    """Both critics. obs [B, o], act [B, N, d] -> [2, B, N]; the state's part is computed once."""

    def one(net):
        w_obs, w_act = jnp.split(net[0]["w"], [obs.shape[-1]])
        first = dense({"w": w_obs, "b": net[0]["b"]}, obs)[:, None] + act @ w_act
        return mlp(net[1:], mish(first))[..., 0]

    return jnp.stack([one(net) for net in critics])


def velocity(theta, obs, num_steps):
    """The policy at fixed states: obs [B, o] -> vel(at [B, N, d], t int [] or [B, N]) [B, N, d].

    Its first layer sees [obs | at | time embedding]; the parts of state and time are made here,
    once for all samples and diffusion steps.
    """
    first, *rest = theta["net"]
    o, e = obs.shape[-1], theta["time"][-1]["b"].shape[0]
    w_obs, w_act, w_time = jnp.split(first["w"], [o, first["w"].shape[0] - e])
    obs_part = dense({"w": w_obs, "b": first["b"]}, obs)[:, None]  # [B, 1, H]
    freq = 10_000.0 ** -jnp.linspace(0, 1, 8)  # sinusoidal embedding of 1..T, 16 numbers
    phase = jnp.outer(jnp.arange(1.0, num_steps + 1), freq)
    embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
    time_part = mlp(theta["time"], embedding) @ w_time  # [T, H]

    def vel(at, t):
        t_part = jnp.broadcast_to(time_part[t], (*at.shape[:-1], time_part.shape[-1]))
        return mlp(rest, mish(obs_part + at @ w_act + t_part))

    return vel


# ---- diffusion --------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """The noise levels that a sampler visits, rising, each [S], and its step down from each:
    a_next = coef_a0 a0 + coef_last (a0 predicted one level above) + coef_at a_t + std noise."""

    t: np.ndarray  # index of the level among the T of the diffusion
    alpha: np.ndarray  # a_t = alpha a0 + sigma noise
    sigma: np.ndarray
    coef_a0: np.ndarray
    coef_last: np.ndarray  # 0 but for dpm2
    coef_at: np.ndarray
    std: np.ndarray  # 0 but for ddpm, and there in the last step


def cosine_schedule(num_levels, num_visited=None, sampler="ddpm", s=0.008, beta_max=0.999):
    """Table 4 at num_visited of t = 1..T, by default all, and one of three samplers over them.

    alpha_bar_t = f(t) / f(0), f(t) = cos((t/T + s) / (1 + s) pi/2)^2. Levels visited are dense at
    small t, where the actions get their final spread. ddpm draws from q(a_next | a_t, a0) (Ho et
    al., 2006.11239, eq. 7), ddim keeps the noise that was predicted (Song et al., 2010.02502,
    eq. 12 with sigma = 0), dpm2 does that with a0 extrapolated in log(alpha / sigma) from the last
    two predictions (Lu et al., 2211.01095, Algorithm 2).
    """
    f = np.cos((np.arange(num_levels + 1) / num_levels + s) / (1 + s) * np.pi / 2) ** 2
    bar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], beta_max))
    i = np.arange(num_visited or num_levels)
    t = np.round((num_levels - 1) * (i / max(i[-1], 1)) ** 1.5).astype(np.int32)
    t = np.maximum.accumulate(t - i) + i if len(i) > 1 else t + num_levels - 1  # no level twice
    bar = bar[t]
    bar_next = np.append(1.0, bar[:-1])
    alpha, sigma, extra, std = np.sqrt(bar), np.sqrt(1 - bar), 0 * bar, 0 * bar
    if sampler == "ddpm":
        std = np.sqrt((1 - bar / bar_next) * (1 - bar_next) / (1 - bar))
    if sampler == "dpm2":
        h = -np.diff(np.log(alpha / sigma))
        extra[1:-1] = h[:-1] / h[1:] / 2  # the first step and the last, to t = 0, are ddim's
    coef_at = np.sqrt(1 - bar_next - std**2) / sigma
    gain = np.sqrt(bar_next) - alpha * coef_at
    columns = (alpha, sigma, (1 + extra) * gain, -extra * gain, coef_at, std)
    return Schedule(t, *(x.astype(np.float32) for x in columns))


def sample(vel, schedule, shape, key):
    """From noise down the levels of the schedule, each predicted a0 clipped to [-1, 1]. -> a0."""
    k_init, k_steps = jax.random.split(key)

    def denoise(carry, level):
        (at, last), (i, x) = carry, level
        a0 = jnp.clip(x.alpha * at - x.sigma * vel(at, x.t), -1, 1)
        at = x.coef_a0 * a0 + x.coef_last * last + x.coef_at * at
        if schedule.std.any():
            at += x.std * jax.random.normal(jax.random.fold_in(k_steps, i), shape)
        return (at, a0), None

    start = jax.random.normal(k_init, shape), jnp.zeros(shape)
    levels = np.arange(len(schedule.t)), schedule
    return jax.lax.scan(denoise, start, levels, reverse=True)[0][0]


def sample_actions(args, theta, obs, key):
    """N actions for each state: obs [B, o] -> a0 [B, N, d] in [-1, 1]."""
    d = theta["net"][-1]["b"].shape[0]
    schedule = cosine_schedule(args.diffusion_steps, args.sampling_steps, args.sampler)
    shape = (obs.shape[0], args.num_samples, d)
    return sample(velocity(theta, obs, args.diffusion_steps), schedule, shape, key)


# ---- weights ----------------------------------------------------------------------------------


def weights(args, q, lam):
    """w [B, N] of eq. (9) from q [B, N] and lam [] in reward units, no gradient.

    Mean 1 over N for exp, linear, square and power; 0 for wd1; not normalised for qvpo.
    """
    n, q = q.shape[-1], jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "exp":  # Example 3.1
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "qvpo":  # twice Example 3.2: lam 1/2, but g(y) = y as in Table 1
        return jax.nn.relu(q - jnp.mean(q, axis=-1, keepdims=True)) / 0.5
    if args.weighting == "wd1":  # Example 3.4
        adv = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        return n * (jax.nn.softmax(adv, axis=-1) - jax.nn.softmax(-adv, axis=-1))
    power = {"linear": 1, "square": 2, "power": args.power}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    # differs from paper: the clip of eq. (11) for powers other than 1
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)


# ---- losses and update ------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training changes on the device."""

    theta: dict  # policy: "net" and the time embedding "time"
    critics: list  # two networks
    critics_target: list
    theta_opt: optax.OptState
    critics_opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # updates done


def optimisers(args):
    """Adam for the policy, its rate annealed over the budget (Table 4), and for the critics."""
    policy_updates = max(args.num_updates // args.policy_delay, 1)
    rate = optax.linear_schedule(args.policy_lr, args.policy_lr_end, policy_updates)
    return optax.adam(rate), optax.adam(args.critic_lr)


def init_state(args, obs_dim, act_dim, key):
    """Fresh networks of Table 4 for o observations and d actions."""
    k_net, k_time, *k_critics = jax.random.split(key, 4)
    hidden, embedding = [args.hidden_dim] * 3, 16
    net = init_mlp(k_net, [obs_dim + act_dim + embedding, *hidden, act_dim])
    theta = {"net": net, "time": init_mlp(k_time, [embedding, 2 * embedding, embedding])}
    critics = [init_mlp(k, [obs_dim + act_dim, *hidden, 1]) for k in k_critics]
    policy_adam, critic_adam = optimisers(args)
    targets = jax.tree.map(jnp.copy, critics)  # donated buffers must not be shared
    opts = policy_adam.init(theta), critic_adam.init(critics)
    return State(theta, critics, targets, *opts, jnp.zeros(()), jnp.zeros((), jnp.int32))


def noise_std(args, step):
    """Std of the noise on actions after `step` updates, in half action ranges."""
    progress = jnp.minimum(step * args.num_envs / args.noise_steps, 1.0)
    return args.noise_start + (args.noise_end - args.noise_start) * progress


def best(q, a0):
    """The sample of largest value: q [B, N], a0 [B, N, d] -> [B, d]."""
    index = jnp.argmax(q, axis=-1)[:, None, None]
    return jnp.take_along_axis(a0, index, axis=1)[:, 0]


def perturb(std, a0, key):
    return jnp.clip(a0 + std * jax.random.normal(key, a0.shape), -1, 1)


def critic_loss(critics, obs, act, target):
    """Mean squared error of both critics: obs [B, o], act [B, d], target [B]."""
    q = q_values(critics, obs, act[:, None])[..., 0]
    return jnp.mean((q - target[None]) ** 2, axis=-1).sum(), q


def matching_loss(theta, args, obs, a0, w, key):
    """Reweighted matching, eq. (7): obs [B, o], a0 [B, N, d], w [B, N]; t uniform on 1..T."""
    k_t, k_noise = jax.random.split(key)
    schedule = cosine_schedule(args.diffusion_steps)
    t = jax.random.randint(k_t, w.shape, 0, args.diffusion_steps)
    alpha, sigma = (jnp.asarray(x)[t][..., None] for x in (schedule.alpha, schedule.sigma))
    noise = jax.random.normal(k_noise, a0.shape)
    vel = velocity(theta, obs, args.diffusion_steps)(alpha * a0 + sigma * noise, t)
    return jnp.mean(w * jnp.sum((vel - (alpha * noise - sigma * a0)) ** 2, axis=-1))


POLICY_METRICS = ("w_max", "w_negative", "ess", "kl", "policy_loss", "policy_grad_norm", "lam")


def update_policy(args, state, obs, a0, key):
    """Algorithm 1 at the states obs [B, o] with samples a0 [B, N, d]: weights, lam, matching."""
    k_noise, k_loss = jax.random.split(key)
    if args.train_noise:
        a0 = perturb(noise_std(args, state.step), a0, k_noise)
    q = q_values(state.critics, obs, a0).min(axis=0)
    w = weights(args, q, jnp.exp(state.log_lam))
    log_lam, kl = update_lam(state.log_lam, q, args.eps_kl)
    loss, grads = jax.value_and_grad(matching_loss)(state.theta, args, obs, a0, w, k_loss)
    updates, theta_opt = optimisers(args)[0].update(grads, state.theta_opt)
    theta = optax.apply_updates(state.theta, updates)
    ess = jnp.sum(jnp.abs(w), axis=-1) ** 2 / jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    norm, negative = optax.tree.norm(grads), jnp.mean(w < 0)
    values = (w.max(), negative, ess.mean(), kl, loss, norm, jnp.exp(log_lam))
    metrics = dict(zip(POLICY_METRICS, values, strict=True))
    return state._replace(theta=theta, theta_opt=theta_opt, log_lam=log_lam), metrics


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(args, state, batch, key):
    """One update of the critics and, every policy_delay, of the policy and lam.

    batch [B, 2 o + d + 2] holds rows of the replay. -> state, metrics {name: scalar}; the metrics
    of the policy are 0 on updates that leave it out.
    """
    d = state.theta["net"][-1]["b"].shape[0]
    o = (batch.shape[-1] - d - 2) // 2
    obs, next_obs, act, tail = jnp.split(batch, [o, 2 * o, 2 * o + d], axis=-1)
    reward, terminated = tail[:, 0] * args.reward_scale, tail[:, 1]
    k_sample, k_target, k_policy = jax.random.split(jax.random.fold_in(key, state.step), 3)

    a0 = sample_actions(args, state.theta, next_obs, k_sample)
    next_act = best(q_values(state.critics, next_obs, a0).min(axis=0), a0)
    next_act = perturb(noise_std(args, state.step), next_act, k_target)[:, None]
    next_q = q_values(state.critics_target, next_obs, next_act).min(axis=0)[:, 0]
    target = reward + args.gamma * (1 - terminated) * next_q
    (loss, q), grads = jax.value_and_grad(critic_loss, has_aux=True)(
        state.critics, obs, act, target
    )
    updates, critics_opt = optimisers(args)[1].update(grads, state.critics_opt)
    critics = optax.apply_updates(state.critics, updates)
    critics_target = optax.incremental_update(critics, state.critics_target, args.tau)
    state = state._replace(critics_opt=critics_opt, critics=critics, critics_target=critics_target)

    def refit(state):
        return update_policy(args, state, next_obs, a0, k_policy)

    def keep(state):
        return state, dict.fromkeys(POLICY_METRICS, jnp.zeros(()))

    due = state.step % args.policy_delay == 0
    state, policy_metrics = jax.lax.cond(due, refit, keep, state)
    metrics = {
        "q_target": target.mean(),
        "q": q.mean(),
        "critic_loss": loss,
        "critic_grad_norm": optax.tree.norm(grads),
        "spread": jnp.mean(jnp.std(a0, axis=1)),
        "noise": noise_std(args, state.step),
        **policy_metrics,
    }
    return state._replace(step=state.step + 1), metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def act(args, explore, state, obs, key, step):
    """Best of N samples by the smaller critic, with noise if `explore`: obs [E, o] -> [E, d].

    `step` makes a fresh key of `key`; params come as an argument, so nothing is retraced.
    """
    k_sample, k_noise = jax.random.split(jax.random.fold_in(key, step))
    a0 = sample_actions(args, state.theta, obs, k_sample)
    a0 = best(q_values(state.critics, obs, a0).min(axis=0), a0)
    return perturb(noise_std(args, state.step), a0, k_noise) if explore else a0


SEED_AXES = State(0, 0, 0, 0, 0, 0, None)  # all seeds are at one `step`, so that lax.cond stays one


def stack_seeds(states):
    """States of K seeds -> one State with a leading axis K, but for `step`."""
    return jax.tree.map(lambda *x: jnp.stack(x), *states)._replace(step=jnp.copy(states[0].step))


def take_seed(state, k):
    """The State of seed k out of one of `stack_seeds`."""
    return jax.tree.map(lambda x: x[k], state._replace(step=None))._replace(step=state.step)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update_seeds(args, state, batch, keys):
    """`update` of K seeds: state of `stack_seeds`, batch [K, B, .], keys [K]; metrics are [K]."""
    one = functools.partial(update, args)
    return jax.vmap(one, in_axes=(SEED_AXES, 0, 0), out_axes=(SEED_AXES, 0))(state, batch, keys)


@functools.partial(jax.jit, static_argnums=0)
def act_seeds(args, state, obs, keys, step):
    """`act` of K seeds with exploration: obs [K, E, o], keys [K] -> [K, E, d]."""
    one = functools.partial(act, args, True)
    return jax.vmap(one, in_axes=(SEED_AXES, 0, 0, None))(state, obs, keys, step)


# ---- replay and envs --------------------------------------------------------------------------


def replay_shape(args, obs_dim, act_dim):
    """Shape of `Replay.rows`; the spare rows are those written in two checkpoint intervals."""
    interval = args.checkpoint_every or args.total_timesteps
    rows = args.buffer_size + 2 * (interval + args.num_envs)
    return min(rows, args.total_timesteps + args.num_envs), 2 * obs_dim + act_dim + 2


class Replay:
    """The last buffer_size transitions, float32 rows [obs | next_obs | act | reward | terminated]
    of one memory-mapped file, which takes disk and memory only for what was written.

    The ring is longer than buffer_size (`limit`): what is written after a checkpoint never hides a
    row that a run resumed from it, or from the one before it, still samples.
    """

    def __init__(self, path, shape, limit, written=0):
        if written and (not path.exists() or path.stat().st_size != 4 * math.prod(shape)):
            raise UsageError(f"--resume: {path} is missing or does not fit the checkpoint")
        self.rows = np.memmap(path, np.float32, "r+" if written else "w+", shape=shape)
        self.limit, self.written = limit, written

    def add(self, *columns):
        """One transition for each environment; columns are [E, .] or [E]."""
        rows = np.concatenate([x.reshape(len(x), -1) for x in columns], axis=1)
        self.rows[(self.written + np.arange(len(rows))) % len(self.rows)] = rows
        self.written += len(rows)

    def sample(self, rng, batch_size):
        """Uniform with replacement -> [B, 2 o + d + 2]."""
        size = min(self.written, self.limit)
        return self.rows[(self.written - 1 - rng.integers(size, size=batch_size)) % len(self.rows)]


class Episodes(gym.Wrapper):
    """Seeds each episode from (seed, index, number of the episode) and keeps its actions, so that
    `restore` brings back physics, clocks, statistics and random streams by simulating again."""

    def __init__(self, env, seed, index):
        super().__init__(env)
        self.seed, self.index, self.episode, self.actions = seed, index, -1, []

    def reset(self, *, seed=None, options=None):
        self.episode, self.actions = self.episode + 1, []
        words = np.random.SeedSequence([self.seed, self.index, self.episode]).generate_state(1)
        return self.env.reset(seed=int(words[0]), options=options)

    def step(self, action):
        self.actions.append(np.array(action, np.float32))
        return self.env.step(action)

    def restore(self, episode, actions):
        """Back to where `actions` [L, d] had led in that episode; returns the observation [o]."""
        self.episode = int(episode) - 1
        obs, _ = self.reset()
        for action in actions:
            obs = self.step(action)[0]
        return obs


def landscape(args, v, stock):
    """--reward at the speed v, m/s; stock is dm_control's own: u in cheetah-run, and in walker-run
    stand (5 u + 1) / 6, where f(u) of Appendix F.2 takes the place of u."""
    if args.reward == "stock":
        return stock
    top = TOP_SPEED[args.env_id]
    u = min(max(v / top, 0.0), 1.0)  # differs from paper: in the place of |v - v*|
    f = {"sqrt": u**0.5, "linear": u, "square": u**2, "exp": math.exp(top * u - top)}[args.reward]
    return f if args.domain == "cheetah" else stock * (5 * f + 1) / (5 * u + 1)


class DMControl(gym.Env):
    """A dm_control task; reset(seed=...) fixes all of an episode. Observations join dm_control's
    dict in its own order: cheetah position [8] (qpos without x), velocity [9]; walker orientations
    [14] (xx and xz of each body), height [1], velocity [9]. Info holds the sum of stock rewards,
    the mean speed (m/s; nan where the task has none) and the PhysicsErrors of this process. Such an
    error truncates: the last state known follows itself, with reward 0, and so bootstraps."""

    render_mode, physics_errors = "rgb_array", 0

    def __init__(self, args, video):
        if args.task == "escape" and sys.platform == "linux":  # it draws its terrain, always
            os.environ.setdefault("MUJOCO_GL", "egl")
        from dm_control import suite  # only now: it reads MUJOCO_GL

        known = suite.TASKS_BY_DOMAIN.get(args.domain)
        if args.task not in (known or ()):
            flag, known = ("--task", known) if known else ("--domain", suite.TASKS_BY_DOMAIN)
            raise UsageError(f"{flag} must be one of {', '.join(known)}")
        self.env = suite.load(args.domain, args.task, environment_kwargs={"flat_observation": True})
        self.args, act, physics = args, self.env.action_spec(), self.env.physics
        self.action_space = gym.spaces.Box(np.float32(act.minimum), np.float32(act.maximum))
        obs = self.env.observation_spec()["observations"]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float64)
        name = "horizontal_velocity" if args.domain == "walker" else "speed"
        self.speed = getattr(physics, name, lambda: math.nan)
        self.metadata = {"render_fps": round(1 / self.env.control_timestep())}
        self.render = functools.partial(physics.render, 240, 240, camera_id=0)
        render_fast(physics.model)

    def reset(self, *, seed=None, options=None):
        self.env.task.random.seed(seed)
        self.stock = self.path = self.steps = 0
        self.obs = self.env.reset().observation["observations"]
        return self.obs, {}

    def step(self, action):
        try:
            now = self.env.step(action)
        except PhysicsError as error:
            DMControl.physics_errors += 1
            print(f"warning: episode cut off: {error}", file=sys.stderr)
            return self.obs, 0.0, False, True, self.info()
        self.obs, v, stock = now.observation["observations"], float(self.speed()), now.reward
        self.stock, self.path, self.steps = self.stock + stock, self.path + v, self.steps + 1
        reward, terminated = landscape(self.args, v, stock), now.discount == 0  # 1: time limit
        return self.obs, reward, terminated, now.last() and not terminated, self.info()

    def info(self):
        speed = self.path / max(self.steps, 1)
        return {"stock_return": self.stock, "speed": speed, "physics_errors": self.physics_errors}


open_env = DMControl  # what `make_env` wraps


def render_fast(model):
    """20 times faster in software: no shadows, no multisampling, no reflections."""
    model.vis.quality.shadowsize, model.vis.quality.offsamples = 0, 0
    model.mat_reflectance[:] = 0


def make_env(args, index, seed, video):
    """One environment for `make_envs`; its first episode is filmed to `video`, unless None."""
    with warnings.catch_warnings():  # v4 is the paper's; GLFW warns where there is no screen
        ignored = ".*out of date|.*Overwriting existing videos|.*X11|.*GLFW"
        warnings.filterwarnings("ignore", ignored)
        env = open_env(args, video)
        if video:
            folder, first = str(video.parent), lambda episode: episode == 0
            env = gym.wrappers.RecordVideo(env, folder, first, name_prefix=video.name)
    return Episodes(gym.wrappers.RecordEpisodeStatistics(env), seed, index)


def make_envs(args, num_envs, seed, video=None):
    """Vector of environments, the first one filmed. A done step returns the next episode's first
    observation; the last one is infos["final_obs"], statistics are in infos["final_info"]."""
    videos = [video] + [None] * (num_envs - 1)
    thunks = [functools.partial(make_env, args, i, seed, v) for i, v in enumerate(videos)]
    try:
        envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"{ENV_FLAGS} {args.env_id}: {' '.join(str(error).split())}") from None
    obs, act = envs.single_observation_space, envs.single_action_space
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, act))
    real = np.issubdtype(act.dtype, np.floating)
    # dm_control gives 1e10 as the bound of an actuator without limits
    if not (flat and real and act.is_bounded() and np.abs([act.low, act.high]).max() < 1e10):
        rule = "only flat Box observations and flat, bounded, real Box actions are supported"
        raise UsageError(f"{ENV_FLAGS} {args.env_id}: {rule}, not {obs} and {act}")
    return envs


def episode_stats(infos, i, names):
    """Statistics of the episode of environment i that just ended, from the vector's infos."""
    last = infos["final_info"] | infos["final_info"]["episode"]
    return tuple(last[name][i] for name in names)


def scale_action(envs, a0):
    """From the policy's [-1, 1] to the environment's range (Humanoid: +-0.4), float32."""
    low, high = envs.single_action_space.low, envs.single_action_space.high
    return (low + (a0 + 1) / 2 * (high - low)).astype(np.float32)


# ---- evaluate ---------------------------------------------------------------------------------


def evaluate(args, state, key, step, run_dir, stop=()):
    """eval_episodes episodes at once, best of N without noise, the same ones at every call.

    -> [eval_episodes, columns of eval.csv]; None once `stop` is not empty.
    """
    video = run_dir / "videos" / f"step-{step}" if args.capture_video else None
    envs = make_envs(args, args.eval_episodes, EVAL_SEED, video)
    (obs, _), rows, t = envs.reset(), {}, 0
    while len(rows) < args.eval_episodes and not stop:
        a0 = act(args, False, state, obs.astype(np.float32), key, np.int32(t))
        obs, _, _, _, infos = envs.step(scale_action(envs, np.asarray(a0)))
        for i in np.flatnonzero(infos.get("_final_info", ())):
            rows.setdefault(i, (step, i, *episode_stats(infos, i, EPISODE.values())))
        t += 1
    envs.close()
    return None if stop else np.array([rows[i] for i in sorted(rows)], np.float64)


# ---- checkpoint and log -----------------------------------------------------------------------


def named_leaves(state):
    """{name: array} of a pytree, as a checkpoint stores it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {"state" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@dataclasses.dataclass
class Run:
    """What one seed has on the host."""

    args: Args
    folder: Path
    envs: gym.vector.VectorEnv
    obs: np.ndarray  # [E, o]
    replay: Replay
    evals: np.ndarray  # rows of eval.csv
    rng: np.random.Generator  # of the first actions and the batches
    log: SummaryWriter
    returns: deque  # of the last training episodes


def save_checkpoint(run, state, name="checkpoint.npz"):
    """Writes arrays only, atomically, and keeps the file it replaces as {stem}.previous.npz.

    state is that of this seed alone; the environments are stored as episode numbers and actions.
    """
    run.replay.rows.flush()
    run.log.flush()
    meta = {"step": run.replay.written, "rng": run.rng.bit_generator.state}
    meta = json.dumps({"script": SCRIPT, "args": dataclasses.asdict(run.args), **meta})
    episodes = run.envs.envs
    arrays = jax.device_get(named_leaves(state)) | {
        "envs.episode": np.array([e.episode for e in episodes]),
        "envs.length": np.array([len(e.actions) for e in episodes]),
        "envs.actions": np.array([a for e in episodes for a in e.actions], np.float32),
        "evals": run.evals,
        "meta": np.frombuffer(meta.encode(), np.uint8),
    }
    path = run.folder / name
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    if zipfile.is_zipfile(path):  # a truncated one must not replace the whole one before it
        path.replace(path.with_suffix(".previous.npz"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path, args, template, limit=math.inf):
    """-> state in the tree of `template`, arrays, meta; falls back to the file before this one.

    UsageError if there is none, or none is whole, of this script and these arguments, and of a step
    up to `limit`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays["meta"].tobytes())
        if (meta["script"], Args(**meta["args"])) != (SCRIPT, args):
            raise ValueError("written by another script or with other arguments")
        if meta["step"] > limit:
            raise ValueError(f"of step {meta['step']}, but another seed has {limit}")
        names = named_leaves(template)
        if any(arrays[name].shape != x.shape for name, x in names.items()):
            raise ValueError("networks of other sizes")
        leaves = [arrays[name] for name in names]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), arrays, meta
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = f"no usable checkpoint in {path}: {' '.join(str(error).split())}"
    previous = path.with_suffix(".previous.npz")
    if not previous.exists():
        raise UsageError(reason)
    print(f"warning: {reason}; trying {previous}", file=sys.stderr)
    return load_checkpoint(previous, args, template, limit)


def load_runs(args, run_dir, template):
    """[`load_checkpoint`] of all seeds at the newest step that all have; [] if one has none yet."""
    dirs = run_dirs(args, run_dir)
    if not all(any(folder.glob("checkpoint*.npz")) for _, folder in dirs):
        return []

    def load(limit):
        return [load_checkpoint(x / "checkpoint.npz", a, template, limit) for a, x in dirs]

    loaded = load(math.inf)
    while len(steps := {meta["step"] for *_, meta in loaded}) > 1:  # killed while it saved
        loaded = load(min(steps))
    return loaded


def run_dirs(args, run_dir):
    """[(its args, its folder)] of each seed. A folder of one seed is that of a run by itself; more
    than one are {run_dir}/seed-{seed}, and each of them can be resumed or evaluated alone."""
    if args.num_seeds == 1:
        return [(args, run_dir)]
    seeds = range(args.seed, args.seed + args.num_seeds)
    alone = {"num_seeds": 1, "run_dir": None}
    return [(dataclasses.replace(args, seed=k, **alone), run_dir / f"seed-{k}") for k in seeds]


def create_run_dir(args, shape):
    """Makes the run folder with args.json and versions.json; refuses one that is in use."""
    name = f"{args.env_id}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
    versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    place = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    size = 4 * math.prod(shape) * args.num_seeds / 1e9
    free = shutil.disk_usage(place).free / 1e9
    if size > free:
        raise UsageError(f"--buffer-size takes {size:.1f} GB in --run-dir, {free:.1f} are free")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise UsageError(f"--run-dir {run_dir} is not empty; --resume goes on with a run")
        folders = {run_dir: args} | {folder: own for own, folder in run_dirs(args, run_dir)}
        for folder, seed_args in folders.items():
            folder.mkdir(exist_ok=True)
            for file, content in (("args", dataclasses.asdict(seed_args)), ("versions", versions)):
                (folder / f"{file}.json").write_text(json.dumps(content, indent=2))
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir}: {error.strerror}") from None
    return run_dir


def open_log(args, run_dir, step):
    """TensorBoard writer of a run, mirrored to Weights & Biases with --track."""
    if args.track:
        import wandb

        wandb.init(project="simpo", name=run_dir.name, config=vars(args), sync_tensorboard=True)
    return SummaryWriter(str(run_dir), purge_step=step + 1)


def log_charts(log, values, step):
    """Writes {tag: value}; nan stands for what an environment does not measure."""
    for tag, value in values.items():
        if not math.isnan(value):
            log.add_scalar(f"charts/{tag}", value, step)


def log_metrics(log, metrics, step):
    """Writes one update's metrics; Diverged names the first, in order of computation, to be off."""
    metrics = {name: float(value) for name, value in metrics.items()}
    for name, value in metrics.items():
        log.add_scalar(f"losses/{name}", value, step)
    for name, value in metrics.items():
        if not math.isfinite(value) or name.endswith("grad_norm") and value > GRAD_NORM_LIMIT:
            raise Diverged(f"{name} is {value:.3g}")


def eval_columns(rows):
    """{name: values} of what one evaluation is judged by: all of EPISODE but the length."""
    columns = zip(EPISODE, rows[:, 2:].T, strict=True)
    return {name: x for name, x in columns if name != "length"}


def summary(rows):
    """Mean and std over one evaluation, as text."""
    means = (
        f"{name} {x.mean():.{DECIMALS}f} +- {x.std():.{DECIMALS}f}"
        for name, x in eval_columns(rows).items()
    )
    return f"{', '.join(means)} (std over {len(rows)} episodes)"


# ---- main -------------------------------------------------------------------------------------


def parse_flags(**kwargs):
    """Args from the command line; an error of tyro's, a box of text, becomes one line."""
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(Args, **kwargs)
        except SystemExit as error:
            if not error.code:  # --help
                raise
            text = box.getvalue().partition("\n")[2]  # after the title
            raise UsageError(" ".join(re.sub("[\u2500-\u257f]|-{4,}", " ", text).split())) from None


def parse_args():
    """-> args, mode "train", "resume" or "evaluate", that run's folder and args, or None.

    --resume and --evaluate take every argument from the run folder; a flag beside them may only
    repeat it, but for what an evaluation is free to choose.
    """
    args = parse_flags()
    if args.track and not (find_spec("wandb") and find_spec("tensorboard")):
        raise UsageError("--track needs Weights & Biases: pip install wandb tensorboard")
    mode = "resume" if args.resume else "evaluate" if args.evaluate else "train"
    if mode == "train":
        return args, mode, None, None
    run_dir = Path(getattr(args, mode))
    try:
        saved = Args(**json.loads((run_dir / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--{mode} {run_dir} is not a run folder: {error}") from None
    if mode == "evaluate" and saved.num_seeds > 1:
        raise UsageError(f"--evaluate {run_dir} has several seeds: choose {run_dir}/seed-...")
    args = dataclasses.replace(parse_flags(default=saved), **{mode: None})
    for field in dataclasses.fields(Args):
        value, old = getattr(args, field.name), getattr(saved, field.name)
        free = mode == "evaluate" and field.name in ("eval_episodes", "capture_video")
        if value != old and not free:
            flag = "--" + field.name.replace("_", "-")
            raise UsageError(f"{flag} {value} beside --{mode}, but the run has {old}")
    return args, mode, run_dir, saved


def shardings(args):
    """The devices at work -> sharding of State, as a prefix of its tree, and of batches [K, B, .].

    Each device has whole seeds if they come out even, or else a part of every batch.
    """
    devices, count = jax.devices(), args.num_devices
    if count is None:
        count = len(devices) if devices[0].platform == "cpu" else 1
        count = count if args.num_seeds % count == 0 else math.gcd(count, args.batch_size)
    even = args.num_seeds % count == 0
    if count > len(devices) or not even and args.batch_size % count:
        rule = f"at most {len(devices)} here and divide --batch-size {args.batch_size}"
        raise UsageError(f"--num-devices must be {rule}, got {count}")
    mesh = jax.sharding.Mesh(np.array(devices[:count]), ("devices",))
    whole, first, second = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("devices",), (None, "devices"))
    )
    if even and count > 1:
        return State(*[first] * 6, whole), first
    return State(*[whole] * 7), second


def watch_signals():
    """The list to which SIGINT and SIGTERM add their number; a second one ends the program."""
    received = []

    def note(signum, _):
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return received


def compile_apart(args, runs, state, batches, key):
    """Runs act and update once on copies, so that the training time holds no compilation."""
    start, state = time.perf_counter(), jax.tree.map(jnp.copy, state)
    obs = np.stack([run.obs for run in runs]).astype(np.float32)
    act_seeds(args, state, obs, key, np.int32(0))
    rows = np.zeros((len(runs), args.batch_size, runs[0].replay.rows.shape[1]), np.float32)
    jax.block_until_ready(update_seeds(args, state, jax.device_put(rows, batches), key))
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def step_envs(envs, replay, obs, a0):
    """One step of all environments into the replay -> next obs, and the statistics of CHARTS of
    each episode that ended. The replay gets the true last observation of an episode."""
    if not np.isfinite(a0).all():
        raise Diverged("an action is not finite")
    next_obs, reward, terminated, truncated, infos = envs.step(scale_action(envs, a0))
    last_obs, ended = next_obs.copy(), []
    for i in np.flatnonzero(terminated | truncated):
        last_obs[i] = infos["final_obs"][i]
        ended.append(episode_stats(infos, i, CHARTS.values()))
    for name, x in (("reward", reward[:, None]), ("observation", last_obs)):
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            raise Diverged(f"{name} of environment {bad.argmax()} is not finite")
    replay.add(obs, last_obs, a0, reward, terminated)  # truncation bootstraps: not stored
    return next_obs, ended


def step_run(run, a0):
    """`step_envs` of one seed, with its log: a0 [E, d]."""
    run.obs, ended = step_envs(run.envs, run.replay, run.obs, a0)
    for stats in ended:
        run.returns.append(stats[0])
        log_charts(run.log, dict(zip(CHARTS, stats, strict=True)), run.replay.written)


def evaluate_runs(args, runs, state, keys, bar, stop):
    """An evaluation of each seed that has none at this step, into its eval.csv and log, until
    stopped. state of `stack_seeds`, keys [K]."""
    for k, run in enumerate(runs):
        step = run.replay.written
        if step in run.evals[:, 0]:
            continue
        rows = evaluate(args, take_seed(state, k), keys[k], step, run.folder, stop)
        if rows is None:
            return
        run.evals = np.concatenate([run.evals, rows])
        np.savetxt(run.folder / "eval.csv", run.evals, **EVAL_CSV)
        means = {f"eval_{name}": x.mean() for name, x in eval_columns(rows).items()}
        log_charts(run.log, means, step)
        seed = f", seed {run.args.seed}" if args.num_seeds > 1 else ""
        bar.write(f"step {step}: {summary(rows)}{seed}")


def save_runs(runs, state, name):
    """`save_checkpoint` of each seed; state of `stack_seeds`."""
    host = jax.device_get(state)
    for k, run in enumerate(runs):
        save_checkpoint(run, take_seed(host, k), name)


def close_runs(run_dir, runs, stop):
    """Closes the logs and, of a complete run, removes the replay; returns the exit code."""
    for run in runs:
        run.log.close()
        if not stop:  # only a resume needs it
            Path(run.replay.rows.filename).unlink()
    if not stop:
        return 0
    step = runs[0].replay.written
    print(f"stopped at step {step}; --resume {run_dir} goes on", file=sys.stderr)
    return 128 + stop[0]


def due(args, every, step):
    """Whether what comes every so many steps, and at the end, comes after this one."""
    return step >= args.total_timesteps or step and every and step % every < args.num_envs


def train(args, run_dir, runs, state, keys, batches, stop):
    """The loop of Algorithm 1 around the environments of all seeds; returns the exit code.

    The device updates while the environments step: a batch is drawn before the transitions of the
    step under way.
    """
    _, k_act, k_update, k_eval = keys
    step, updates = runs[0].replay.written, int(state.step)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
    first, logged, start = step, step, time.perf_counter()
    while True:
        if due(args, args.eval_every, step):
            paused = time.perf_counter()
            evaluate_runs(args, runs, state, k_eval, bar, stop)
            start += time.perf_counter() - paused
        end = stop or step >= args.total_timesteps
        if end or step > first and due(args, args.checkpoint_every, step):
            save_runs(runs, state, "checkpoint.npz")
        if end:
            break
        learning = step >= args.learning_starts
        if learning:
            obs = np.stack([run.obs for run in runs]).astype(np.float32)
            a0 = act_seeds(args, state, obs, k_act, np.int32(step))
            batch = np.stack([run.replay.sample(run.rng, args.batch_size) for run in runs])
            state, metrics = update_seeds(args, state, jax.device_put(batch, batches), k_update)
        else:
            a0 = [run.rng.uniform(-1, 1, run.envs.action_space.shape) for run in runs]
        try:
            for run, actions in zip(runs, np.asarray(a0), strict=True):
                step_run(run, actions)
            step = runs[0].replay.written
            bar.update(args.num_envs)
            if learning and updates % (LOG_EVERY * args.policy_delay) == 0:
                sps = (step - logged) / (time.perf_counter() - start)
                for k, run in enumerate(runs):
                    run.log.add_scalar("charts/SPS", sps, step)
                    log_metrics(run.log, {name: x[k] for name, x in metrics.items()}, step)
                means = [sum(run.returns) / max(len(run.returns), 1) for run in runs]
                bar.set_postfix_str(f"return {np.mean(means):.0f}")
                logged, start = step, time.perf_counter()
        except Diverged as error:
            save_runs(runs, state, "diverged.npz")
            path = run.folder / "diverged.npz"
            raise Diverged(f"{error} at step {step}; saved in {path}") from None
        updates += learning
    bar.close()
    return close_runs(run_dir, runs, stop)


def open_run(args, folder, envs, arrays, meta):
    """A seed's Run, new or as its checkpoint has it."""
    shape = replay_shape(
        args, envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    )
    rng = np.random.default_rng(args.seed)
    if arrays is None:  # new, or killed before its first checkpoint
        obs, _ = envs.reset()
        evals = np.zeros((0, 2 + len(EPISODE)))
    else:
        actions = np.split(arrays["envs.actions"], np.cumsum(arrays["envs.length"])[:-1])
        pasts = zip(envs.envs, arrays["envs.episode"], actions, strict=True)
        obs, evals = np.stack([env.restore(*past) for env, *past in pasts]), arrays["evals"]
        rng.bit_generator.state = meta["rng"]
    replay = Replay(folder / "replay.dat", shape, args.buffer_size, meta["step"])
    log = open_log(args, folder, meta["step"])
    return Run(args, folder, envs, obs, replay, evals, rng, log, deque([], 20))


def run(args, mode, run_dir, saved):
    """Sets up the runs of all seeds, then trains, resumes or evaluates; returns the exit code."""
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    states_at, batches = shardings(args)
    seeds = [seed_args for seed_args, _ in run_dirs(args, Path())]
    envs = [make_envs(x, args.num_envs, x.seed) for x in seeds]
    o, d = envs[0].single_observation_space.shape[0], envs[0].single_action_space.shape[0]
    keys = jnp.stack([jax.random.split(jax.random.key(x.seed), 4) for x in seeds], axis=1)
    keys = jax.device_put(keys, states_at.step)
    states = [init_state(args, o, d, keys[0, k]) for k in range(args.num_seeds)]
    if mode == "evaluate":
        state, _, meta = load_checkpoint(run_dir / "checkpoint.npz", saved, states[0])
        state = jax.device_put(state, states_at.step)
        rows = evaluate(args, state, keys[3, 0], meta["step"], run_dir)
        print(f"step {meta['step']}: {summary(rows)}")
        return 0
    loaded = load_runs(saved, run_dir, states[0]) if mode == "resume" else []
    steps = [meta["step"] for _, arrays, meta in loaded if meta["step"] in arrays["evals"][:, 0]]
    if len(steps) == args.num_seeds and steps[0] >= args.total_timesteps:
        print(f"{run_dir} is complete at step {steps[0]}")
        return 0
    if mode == "train":
        run_dir = create_run_dir(args, replay_shape(args, o, d))
    loaded = loaded or [(state, None, {"step": 0}) for state in states]
    state = jax.device_put(stack_seeds([state for state, *_ in loaded]), states_at)
    runs = [
        open_run(seed_args, folder, seed_envs, *rest)
        for (seed_args, folder), seed_envs, (_, *rest) in zip(
            run_dirs(args, run_dir), envs, loaded, strict=True
        )
    ]
    sizes = [sum(x.size for x in jax.tree.leaves(net)) for net in states[0][:2]]
    print(f"run folder  {run_dir}")
    print(f"device      {batches.num_devices} x {jax.devices()[0].device_kind}")
    print(f"parameters  policy {sizes[0]:,}, critics {sizes[1]:,}", flush=True)
    stop = watch_signals()
    compile_apart(args, runs, state, batches, keys[2])
    return train(args, run_dir, runs, state, keys, batches, stop)


def main():
    try:
        return run(*parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
