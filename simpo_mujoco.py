"""SiMPO on MuJoCo: online RL of a diffusion policy by signed reweighted matching.

    python simpo_mujoco.py --env-id Hopper-v4 --neg-clip -0.05

Section 5.2 of arXiv 2603.10250, with Algorithm 1 and the settings of its Table 4. One
million steps take about three hours on two cores. To use it, copy this file and
common.py. README.md has the results.

Noise levels t = 0 .. T - 1 rise, with a_t = alpha_t a0 + sigma_t noise and
velocity = alpha_t noise - sigma_t a0. Shapes: B states, N samples of a state,
o observation, d action, H hidden units.

Where the paper is silent, or we depart from it (evidence: docs/mujoco.md):
1. Samples come from a slow copy of the policy, pi_old, which also acts and serves the
   critic targets.
2. Gaussian noise that falls over the run is added to the samples and to actions.
3. Critic targets take the best of 4 next actions, acting and evaluation the best of 8.
4. Critics take two steps on a batch; target critics and pi_old follow at rate 0.02.
5. l is in units of weights whose mean is 1, and clips every power; in eq. (11) it clips
   the linear weight.
6. The squared error of each dimension is bounded.
7. The smaller of two target critics weights the samples.
8. N = 8 and a deterministic sampler of six steps. `--num-samples 32 --sampler ddpm
   --sampling-steps 20` has the paper's N and T, and takes four times as long.
"""

import argparse
import collections
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from gymnasium.spaces import Box
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam

warnings.filterwarnings("ignore", ".*out of date")  # the paper's tasks are v4
EMBEDDING = 16  # size of the embedding of t
KL_SHARE = 1.5 / math.log(32)  # the paper's eps_kl as a share of log N
EVAL_SEED = 2**30  # evaluations start from it, training draws its seeds below
EVAL_STEPS = 10_000  # ends an evaluation episode that nothing else ends
PACKAGES = ("jax", "optax", "numpy", "gymnasium", "mujoco")
LOG_EVERY = 2_000  # environment steps between rows of losses
DIVERGED = 3  # exit code of a run whose numbers are not finite


@dataclasses.dataclass(frozen=True)
class Args:
    # --- Experiment ---
    env_id: str = "Hopper-v4"  # Gymnasium id; module:Name-v0 imports module first
    seed: int = 1  # of networks, actions, batches and training episodes
    total_timesteps: int = 1_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments; each step of all of them comes with an update
    eval_every: int = 25_000  # environment steps between saves, each with an evaluation
    eval_episodes: int = 20  # of an evaluation, from the same starts every time
    run_dir: str | None = None  # default: runs/{env_id}__simpo_mujoco__{seed}__{time}
    resume: str | None = None  # run folder to continue, with its own flags
    evaluate: str | None = None  # run folder to evaluate instead of training
    capture_video: bool = False  # film the first episode of every evaluation
    track: bool = False  # mirror TensorBoard to Weights & Biases
    # --- Weights of the samples ---
    weighting: Literal["exp", "linear", "square", "power", "qvpo", "wd1"] = "linear"
    neg_clip: float = 0.0  # l in eq. (11): smallest weight; Lin. Neg. is -0.05
    eps_kl: float | None = None  # nats, eq. (30); default 43 % of log N: 1.5 at N = 32
    power: float = 1.5  # p of --weighting power: w = sign(y) |y|^p
    num_samples: int = 8  # N, weighted samples of a state
    # --- Diffusion policy ---
    diffusion_steps: int = 20  # T, noise levels that the policy is trained on
    sampling_steps: int = 6  # noise levels that the sampler visits
    sampler: Literal["ddpm", "dpm2"] = "dpm2"  # ancestral, or of second order
    target_samples: int = 4  # M: critic targets take the best of M next actions
    act_samples: int = 8  # actions taken, and evaluated, are the best of so many
    noise_start: float = 0.5  # std of the noise on samples and actions, first update
    noise_end: float = 0.2  # the same at the last update; geometric in between
    error_bound: float = 5.0  # on the squared error of each action dimension
    # --- Optimisation ---
    policy_lr: float = 3e-4  # Adam's rate for the policy at the first update
    policy_lr_end: float = 3e-5  # the same at the last update; linear in between
    critic_lr: float = 3e-4  # Adam's rate for the critics, constant
    critic_steps: int = 2  # Adam steps of the critics on each batch and its targets
    gamma: float = 0.99  # discount
    tau: float = 0.02  # rate at which target critics and pi_old follow, when updated
    reward_scale: float = 0.2  # of the rewards that the critics see
    batch_size: int = 256  # B
    buffer_size: int = 1_000_000  # most recent transitions that batches are drawn from
    learning_starts: int = 30_000  # environment steps with random actions first
    policy_delay: int = 2  # updates of the critics for one of the policy
    hidden_dim: int = 256  # H, of each of the 3 hidden layers of policy and critics

    @property
    def kl_bound(self):
        """Bound on the KL of the weights, eq. (30), in nats."""
        if self.eps_kl is None:
            return KL_SHARE * math.log(max(self.num_samples, 1))
        return self.eps_kl

    def __post_init__(self):
        rules = {
            "--seed must be in [0, 2^32)": 0 <= self.seed < 2**32,
            "--gamma and --tau must be at most 1": max(self.gamma, self.tau) <= 1,
            "--sampling-steps must be in [2, T]": (
                2 <= self.sampling_steps <= self.diffusion_steps
            ),
        }
        for field in dataclasses.fields(self):
            least = {int: 1, float: 0}.get(field.type)
            if least is not None and field.name not in ("seed", "neg_clip"):
                flag = field.name.replace("_", "-")
                rule = f"--{flag} must be at least {least}"
                rules[rule] = getattr(self, field.name) >= least
        if not self.evaluate:  # rules of training
            clipped = self.weighting in ("linear", "square", "power")
            log_n = math.log(max(self.num_samples, 1))
            first_update = self.learning_starts + self.num_envs
            rules |= {
                "--power must be above 0": self.power > 0,
                "--noise-start and --noise-end: both 0 or neither": (
                    (self.noise_start > 0) == (self.noise_end > 0)
                ),
                "--neg-clip must be at most 0": self.neg_clip <= 0,
                f"--neg-clip is not for {self.weighting}": clipped or not self.neg_clip,
                "--eps-kl must be in (0, log of --num-samples)": (
                    0 < self.kl_bound < log_n
                ),
                "--learning-starts leaves no update before --total-timesteps": (
                    first_update <= self.total_timesteps
                ),
            }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)  # tyro shows it as an error of usage


# ---- networks ------------------------------------------------------------------------
@jax.checkpoint  # recomputed in the backward pass: it is memory-bound on a CPU
def mish(x):
    """x tanh(softplus(x)), with one exp and one division."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def init_mlp(key, sizes):
    """[{"w": [in, out], "b": [out]}, ...]: weights of variance 1 / in, zero biases."""
    init = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    layers = []
    for k, n_in, n_out in zip(keys, sizes[:-1], sizes[1:], strict=True):
        layers.append({"w": init(k, (n_in, n_out)), "b": jnp.zeros(n_out)})
    return layers


def mlp(layers, x):
    for layer in layers[:-1]:
        x = mish(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def q_values(critics, obs, act):
    """Both critics: obs [B, o], act [B, N, d] -> [2, B, N]."""

    def q_value(net):
        # the first layer on [obs | act]: obs is multiplied once, not N times
        w_obs, w_act = jnp.split(net[0]["w"], [obs.shape[-1]])
        obs_part = (obs @ w_obs + net[0]["b"])[:, None]  # [B, 1, H]
        return mlp(net[1:], mish(obs_part + act @ w_act))[..., 0]

    return jnp.stack([q_value(net) for net in critics])


def policy_velocity(theta, obs, num_levels):
    """The policy at states obs [B, o], as a function velocity(a_t [B, N, d], t)."""
    first, *rest = theta["net"]
    obs_dim = obs.shape[-1]
    act_dim = rest[-1]["b"].shape[0]
    # the first layer on [obs | a_t | embedding of t]: all but a_t's part is made once
    w_obs, w_act, w_time = jnp.split(first["w"], [obs_dim, obs_dim + act_dim])
    obs_part = (obs @ w_obs + first["b"])[:, None]  # [B, 1, H]
    frequency = 10_000.0 ** -jnp.linspace(0, 1, EMBEDDING // 2)
    phase = jnp.outer(jnp.arange(1.0, num_levels + 1), frequency)
    embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
    time_part = mlp(theta["time"], embedding) @ w_time  # [T, H]

    def velocity(a_t, t):
        return mlp(rest, mish(obs_part + a_t @ w_act + time_part[t]))

    return velocity


# ---- diffusion -----------------------------------------------------------------------
# These three functions are the path from data to noise. docs/extending.md has those of
# a flow: velocity = noise - a0.
def schedule(num_levels):
    """alpha [T] and sigma [T], cosine as in Table 4 (Nichol and Dhariwal, eq. 17)."""
    s = (np.arange(num_levels + 1) / num_levels + 0.008) / 1.008
    f = np.cos(s * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.cumprod(1 - beta)
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def to_velocity(a0, noise, alpha, sigma):
    return alpha * noise - sigma * a0


def to_a0(a_t, velocity, alpha, sigma):
    return alpha * a_t - sigma * velocity


class Level(NamedTuple):
    """Of a noise level, the sampler's step down from it:

    a_next = coef_a0 a0 + coef_last (a0 predicted one level above) + coef_at a_t
             + std noise."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    coef_a0: np.ndarray
    coef_last: np.ndarray
    coef_at: np.ndarray
    std: np.ndarray


def sampler_levels(args):
    """The levels visited, upwards, as arrays in one Level. Low noise has more of them.

    ddpm is Ho et al. (2006.11239) with variance beta_t, without noise in the last step;
    dpm2 is DPM-Solver++(2M), Lu et al. (2211.01095)."""
    i = np.arange(args.sampling_steps)
    skipped = args.diffusion_steps - args.sampling_steps
    t = np.round(i + skipped * (i / i[-1]) ** 1.7).astype(np.int32)

    alpha, sigma = schedule(args.diffusion_steps)
    alpha = alpha[t]
    sigma = sigma[t]
    alpha_next = np.append(1.0, alpha[:-1])
    sigma_next = np.append(0.0, sigma[:-1])

    # a_next = coef_at a_t + coef_a0 D, where D is a0, or for dpm2 a0 extrapolated:
    # D = a0 + extrapolate (a0 - last a0)
    std = np.zeros_like(alpha)
    extrapolate = np.zeros_like(alpha)
    if args.sampler == "ddpm":
        ratio = alpha / alpha_next
        std[1:] = np.sqrt(sigma**2 - (ratio * sigma_next) ** 2)[1:]
        coef_at = ratio * (sigma_next / sigma) ** 2
    else:
        log_ratio_steps = -np.diff(np.log(alpha / sigma))
        # the first and the last step are of first order
        extrapolate[1:-1] = log_ratio_steps[:-1] / log_ratio_steps[1:] / 2
        coef_at = sigma_next / sigma
    coef_a0 = alpha_next - alpha * coef_at
    return Level(
        t=t,
        alpha=alpha,
        sigma=sigma,
        coef_a0=coef_a0 * (1 + extrapolate),
        coef_last=-coef_a0 * extrapolate,
        coef_at=coef_at,
        std=std,
    )


def sample_actions(args, theta, obs, num_samples, key):
    """Samples of the policy: obs [B, o] -> a0 [B, N, d] in [-1, 1]."""
    velocity = policy_velocity(theta, obs, args.diffusion_steps)
    act_dim = theta["net"][-1]["b"].shape[0]
    shape = (len(obs), num_samples, act_dim)
    k_start, k_steps = jax.random.split(key)

    def denoise(carry, level):
        a_t, last_a0 = carry
        a0 = to_a0(a_t, velocity(a_t, level.t), level.alpha, level.sigma)
        a0 = jnp.clip(a0, -1, 1)
        a_t = level.coef_a0 * a0 + level.coef_last * last_a0 + level.coef_at * a_t
        if args.sampler == "ddpm":
            k_step = jax.random.fold_in(k_steps, level.t)
            a_t += level.std * jax.random.normal(k_step, shape)
        return (a_t, a0), None

    start = (jax.random.normal(k_start, shape), jnp.zeros(shape))
    (_, a0), _ = jax.lax.scan(denoise, start, sampler_levels(args), reverse=True)
    return a0


# ---- weights -------------------------------------------------------------------------
def weights(args, q, lam):
    """Eq. (9): q [B, N] and lam [], in reward units -> w [B, N] of mean 1 over N."""
    n = q.shape[-1]
    q = jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "exp":  # Example 3.1
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "qvpo":  # Example 3.2, w = y as in Table 1; not normalised
        return jax.nn.relu(q - jnp.mean(q, axis=-1, keepdims=True)) / 0.5
    if args.weighting == "wd1":  # Example 3.4; mean 0
        advantage = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        good = jax.nn.softmax(advantage, axis=-1)
        bad = jax.nn.softmax(-advantage, axis=-1)
        return n * (good - bad)
    power = {"linear": 1, "square": 2, "power": args.power}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)  # (5)


# ---- update --------------------------------------------------------------------------
class Batch(NamedTuple):
    """B transitions. terminated is 0 at time limits, where targets bootstrap."""

    obs: np.ndarray  # [B, o]
    next_obs: np.ndarray  # [B, o]
    act: np.ndarray  # [B, d]
    reward: np.ndarray  # [B]
    terminated: np.ndarray  # [B]


class State(NamedTuple):
    """What training changes on the device; theta_old and critics choose actions."""

    theta: dict  # policy: its "net", and "time", the embedding of t
    theta_old: dict  # pi_old of Algorithm 1, a slow copy of theta (1)
    critics: list  # two networks
    critics_target: list
    theta_opt: optax.OptState
    critics_opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # updates so far, each of which steps the critics


def policy_optimiser(args):
    """Adam whose rate falls linearly, reaching its end at the last update (Table 4)."""
    updates = (args.total_timesteps - args.learning_starts) // args.num_envs
    steps = max(math.ceil(updates / args.policy_delay) - 1, 1)
    return optax.adam(optax.linear_schedule(args.policy_lr, args.policy_lr_end, steps))


def critic_optimiser(args):
    return optax.adam(args.critic_lr)


def init_state(args, obs_dim, act_dim, key):
    k_net, k_time, k_critic1, k_critic2 = jax.random.split(key, 4)
    hidden = [args.hidden_dim] * 3
    theta = {
        "net": init_mlp(k_net, [obs_dim + act_dim + EMBEDDING, *hidden, act_dim]),
        "time": init_mlp(k_time, [EMBEDDING, 2 * EMBEDDING, EMBEDDING]),
    }
    sizes = [obs_dim + act_dim, *hidden, 1]
    critics = [init_mlp(k_critic1, sizes), init_mlp(k_critic2, sizes)]
    return State(
        theta=theta,
        theta_old=jax.tree.map(jnp.copy, theta),
        critics=critics,
        critics_target=jax.tree.map(jnp.copy, critics),
        theta_opt=policy_optimiser(args).init(theta),
        critics_opt=critic_optimiser(args).init(critics),
        log_lam=jnp.zeros(()),
        step=jnp.int32(0),
    )


def noise_std(args, step):
    """Std of the noise on samples of pi_old after `step` updates (2)."""
    share = step * args.num_envs / (args.total_timesteps - args.learning_starts)
    return args.noise_start ** (1 - share) * args.noise_end**share


@functools.partial(jax.jit, static_argnums=(0, 3))
def best_action(args, state, obs, num_samples, key, step=0, std=0.0):
    """Of samples of pi_old the best by the smaller critic: obs [B, o] -> a0 [B, d].

    Each step draws its own samples from the key. Noise of this std is added to them."""
    k_sample, k_noise = jax.random.split(jax.random.fold_in(key, step))
    a0 = sample_actions(args, state.theta_old, obs, num_samples, k_sample)
    a0 += std * jax.random.normal(k_noise, a0.shape)
    q = q_values(state.critics, obs, a0).min(axis=0)
    best = jnp.argmax(q, axis=-1)[:, None, None]
    return jnp.take_along_axis(a0, best, axis=1)[:, 0]


def update_critics(args, state, batch, key):
    """critic_steps steps towards r + gamma Q'(next_obs, best of M next actions)."""
    # differs from paper: pi_old's (1) best of M (3), several steps on one batch (4)
    next_act = best_action(args, state, batch.next_obs, args.target_samples, key)
    next_q = q_values(state.critics_target, batch.next_obs, next_act[:, None])
    discount = args.gamma * (1 - batch.terminated[:, None])
    target = args.reward_scale * batch.reward[:, None] + discount * next_q.min(axis=0)

    def critic_loss(critics):
        q = q_values(critics, batch.obs, batch.act[:, None])  # [2, B, 1]
        return jnp.mean((q - target) ** 2, axis=(1, 2)).sum()

    critics = state.critics
    opt = state.critics_opt
    for _ in range(args.critic_steps):
        loss, grads = jax.value_and_grad(critic_loss)(critics)
        updates, opt = critic_optimiser(args).update(grads, opt)
        critics = optax.apply_updates(critics, updates)
    critics_target = optax.incremental_update(critics, state.critics_target, args.tau)

    metrics = {
        "q": target.mean(),
        "critic_loss": loss,
        "critic_grad_norm": optax.tree.norm(grads),
    }
    state = state._replace(
        critics=critics,
        critics_target=critics_target,
        critics_opt=opt,
    )
    return state, metrics


def matching_loss(theta, args, obs, a0, w, key):
    """Reweighted matching, eq. (7), t uniform: obs [B, o], a0 [B, N, d], w [B, N]."""
    k_t, k_noise = jax.random.split(key)
    t = jax.random.randint(k_t, w.shape, 0, args.diffusion_steps)
    noise = jax.random.normal(k_noise, a0.shape)
    alpha, sigma = jnp.float32(schedule(args.diffusion_steps))[:, t][..., None]

    a_t = alpha * a0 + sigma * noise
    velocity = policy_velocity(theta, obs, args.diffusion_steps)(a_t, t)
    error = (velocity - to_velocity(a0, noise, alpha, sigma)) ** 2
    # differs from paper: bounded (6), or w < 0 gains without end by pushing away
    error = jnp.minimum(error, args.error_bound)
    return jnp.mean(w * jnp.sum(error, axis=-1))


def update_policy(args, state, obs, key):
    """A step of Algorithm 1 at states obs [B, o] -> state, metrics."""
    k_sample, k_noise, k_loss = jax.random.split(key, 3)

    # Stage I: samples of pi_old and their weights under the signed target measure
    a0 = sample_actions(args, state.theta_old, obs, args.num_samples, k_sample)
    spread = a0.std(axis=1).mean()
    # differs from paper: noise on the samples (2)
    a0 += noise_std(args, state.step) * jax.random.normal(k_noise, a0.shape)
    # differs from paper: the smaller of two critics (7)
    q = q_values(state.critics_target, obs, a0).min(axis=0)  # [B, N]
    w = weights(args, q, jnp.exp(state.log_lam))
    log_lam, kl = update_lam(state.log_lam, q, args.kl_bound)

    # Stage II: the policy is matched to the weighted samples
    loss_and_grad = jax.value_and_grad(matching_loss)
    loss, grads = loss_and_grad(state.theta, args, obs, a0, w, k_loss)
    updates, opt = policy_optimiser(args).update(grads, state.theta_opt)
    theta = optax.apply_updates(state.theta, updates)
    # differs from paper: pi_old follows slowly (1)
    theta_old = optax.incremental_update(theta, state.theta_old, args.tau)

    w_squares = jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    metrics = {
        "policy_loss": loss,
        "policy_grad_norm": optax.tree.norm(grads),
        "kl": kl,
        "lam": jnp.exp(log_lam),
        "ess": jnp.mean(jnp.sum(jnp.abs(w), axis=-1) ** 2 / w_squares),
        "spread": spread,
        "w_max": w.max(),
        "w_negative": jnp.mean(w < 0),
    }
    state = state._replace(
        theta=theta,
        theta_old=theta_old,
        theta_opt=opt,
        log_lam=log_lam,
    )
    return state, metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(args, with_policy, state, batch, key):
    """One iteration: critics, and the policy if asked -> state, metrics {name: []}.

    `state` is donated: its arrays must not be used afterwards."""
    k_next, k_policy = jax.random.split(jax.random.fold_in(key, state.step))
    state, metrics = update_critics(args, state, batch, k_next)
    if with_policy:  # every policy_delay updates
        state, policy_metrics = update_policy(args, state, batch.obs, k_policy)
        metrics |= policy_metrics
    return state._replace(step=state.step + 1), metrics


# ---- environments and replay ---------------------------------------------------------
class Rescaled(gym.Wrapper):
    """Takes actions in [-1, 1] and returns every observation as a new float32 array."""

    def __init__(self, env):
        super().__init__(env)
        obs = env.observation_space
        act = env.action_space
        for space in (obs, act):
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(f"{space} is not flat; wrap the environment")
        limit = np.abs([act.low, act.high]).max(initial=0)  # dm_control's inf is 1e10
        if act.dtype.kind != "f" or not 0 < limit < 1e10:
            raise ValueError(f"{act} is not continuous and bounded")
        self.observation_space = Box(-np.inf, np.inf, obs.shape)
        self.action_space = Box(-1, 1, act.shape)

    def action(self, a0):
        """a0 [d], clipped to [-1, 1], in the units of the environment."""
        space = self.env.action_space
        action = space.low + (a0 + 1) / 2 * (space.high - space.low)
        return np.clip(action, space.low, space.high).astype(space.dtype)

    def reset(self, **options):
        obs, _ = self.env.reset(**options)
        return np.array(obs, np.float32), {}

    def step(self, a0):
        obs, reward, terminated, truncated, _ = self.env.step(self.action(a0))
        reward = np.asarray(reward).item()  # some environments return [1]
        return np.array(obs, np.float32), reward, bool(terminated), bool(truncated), {}


def make_env(args, **options):
    env = Rescaled(gym.make(args.env_id, **options))
    base = env.unwrapped
    if hasattr(base, "mujoco_renderer"):  # films follow the body, if a camera does
        for i in range(base.model.ncam):
            if base.model.camera(i).name == "track":
                base.mujoco_renderer.camera_id = i
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_envs(args, count, **options):
    """Environments stepped in turn. A step that ends an episode returns the next one's
    first observation; its own last one is in infos."""
    thunk = functools.partial(make_env, args, **options)
    same_step = gym.vector.AutoresetMode.SAME_STEP
    try:
        return gym.vector.SyncVectorEnv([thunk] * count, autoreset_mode=same_step)
    except Exception as error:  # a constructor can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"error: cannot make {args.env_id}: {reason}") from None


def require_finite(step, **arrays):
    """Ends the run where an array is not finite in float32."""
    for name, array in arrays.items():
        if not np.isfinite(np.float32(array)).all():
            print(f"error: {name} is not finite at step {step}", file=sys.stderr)
            raise SystemExit(DIVERGED)


def open_replay(args, path, obs_dim, act_dim, mode):
    """The last buffer_size transitions, as rows of a file, with the fields of Batch."""
    fields = [
        ("obs", np.float32, obs_dim),
        ("next_obs", np.float32, obs_dim),
        ("act", np.float32, act_dim),
        ("reward", np.float32),
        ("terminated", np.float32),
    ]
    size = args.buffer_size * np.dtype(fields).itemsize
    if mode == "r+" and path.stat().st_size != size:
        raise SystemExit(f"error: {path} is not whole")
    return np.memmap(path, fields, mode, shape=args.buffer_size)


def add_transitions(replay, step, batch):
    """Writes a transition of each environment, `step` having been made before."""
    index = (step + np.arange(len(batch.reward))) % len(replay)
    for name, values in batch._asdict().items():
        replay[name][index] = values


def sample_batch(replay, step, rng, batch_size):
    rows = replay[rng.integers(min(step, len(replay)), size=batch_size)]
    return Batch(*(rows[name] for name in Batch._fields))


# ---- evaluation and checkpoints ------------------------------------------------------
def evaluate(args, envs, state, key, run_dir, step, table="eval.csv"):
    """An episode in each of E environments, from the same starts every time.

    Writes a row for each of them to the file `table`, films the first one, and gives
    back their returns [E]."""
    obs, _ = envs.reset(seed=EVAL_SEED)
    returns = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs, int)
    running = np.ones(envs.num_envs, bool)
    frames = []
    for t in range(EVAL_STEPS):
        if args.capture_video and running[0]:
            frames.append(envs.envs[0].render())
        a0 = np.asarray(best_action(args, state, obs, args.act_samples, key, t))
        obs, reward, terminated, truncated, _ = envs.step(a0)
        require_finite(step, action=a0, observation=obs, reward=reward)
        returns += reward * running
        lengths += running
        running &= ~(terminated | truncated)
        if not running.any():
            break
    if args.capture_video:
        fps = envs.envs[0].metadata.get("render_fps", 30)
        imageio.mimsave(run_dir / f"film-{step}.mp4", frames, fps=fps)
    write_rows(run_dir / table, step, returns, lengths)
    return returns


def write_rows(path, step, returns, lengths):
    """Adds an evaluation to a CSV file; rows of this step and later ones leave."""
    rows = path.read_text().splitlines()[1:] if path.exists() else []
    rows = [row for row in rows if int(row.split(",")[0]) < step]
    for i in range(len(returns)):
        rows.append(f"{step},{i},{returns[i]:.9g},{lengths[i]}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(["step,episode,return,length", *rows, ""]))
    temporary.replace(path)


def named_leaves(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def save(path, state, step):
    """Plain arrays; a run killed while it saves keeps its last checkpoint."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **jax.device_get(named_leaves(state)), env_step=step)
    temporary.replace(path)


def load(path, state, whole=True):
    """-> state, environment step. A file that is not whole, as the shipped ones, holds
    what chooses actions; all else stays as it is in `state`."""
    old = named_leaves(state)
    try:
        with np.load(path) as file:
            arrays = dict(file) if whole else old | dict(file)
        leaves = [jnp.asarray(arrays[name]) for name in old]
        step = int(arrays["env_step"])
    except Exception as error:  # no file, half a file, another kind of file
        raise SystemExit(f"error: {path} is no checkpoint: {error!r}") from None
    if [x.shape for x in leaves] != [x.shape for x in old.values()]:
        raise SystemExit(f"error: {path} is of another environment or other flags")
    return jax.tree.unflatten(jax.tree.structure(state), leaves), step


def load_policy(run_dir):
    """A trained policy: act(obs [o]) -> action [d] in the units of the environment."""
    args = read_args(run_dir)
    env = make_env(args)
    key = jax.random.key(args.seed)
    state = init_state(args, *env.observation_space.shape, *env.action_space.shape, key)
    state, _ = load(Path(run_dir) / "checkpoint.npz", state, whole=False)

    def act(obs):
        obs = np.array([obs], np.float32)
        a0 = best_action(args, state, obs, args.act_samples, key)
        return env.get_wrapper_attr("action")(np.asarray(a0)[0])

    return act


# ---- main ----------------------------------------------------------------------------
def read_args(folder):
    """The flags of a run, from its folder."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
        differing = set(saved) ^ set(vars(Args()))
        if not differing:
            return Args(**saved)
        versions = (Path(folder) / "versions.json").read_text()
        commit = json.loads(versions)["commit"]
    except (OSError, ValueError, TypeError, KeyError):
        raise SystemExit(f"error: {folder} is no run folder") from None
    raise SystemExit(
        f"error: {folder} was made by commit {commit}, which differs in these flags:"
        f" {', '.join(sorted(differing))}"
    )


def parse_args():
    """The command line; beside --resume or --evaluate the flags of that run hold."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", type=Path)
    either.add_argument("--evaluate", type=Path)
    folders, others = parser.parse_known_args()
    if folders.resume and not {"--track", "--capture-video"}.issuperset(others):
        raise SystemExit(
            "error: --resume takes only --track and --capture-video beside it"
        )
    folder = folders.resume or folders.evaluate
    default = read_args(folder) if folder else Args()
    return tyro.cli(Args, default=default)


def make_run_dir(args, name):
    """A new folder, runs/{name}__{time} or --run-dir, for the files of a run."""
    base = args.run_dir or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(base)
    for count in itertools.count(2):
        try:
            run_dir.mkdir(parents=True)
            break
        except OSError as error:
            if args.run_dir or not isinstance(error, FileExistsError):
                reason = f"--run-dir {run_dir}: {error.strerror}"
                raise SystemExit(f"error: {reason}") from None
            run_dir = Path(f"{base}-{count}")  # two runs started in one second

    here = Path(__file__).parent
    status, commit = subprocess.getstatusoutput(f"git -C '{here}' rev-parse HEAD")
    versions = {package: version(package) for package in PACKAGES}
    versions["commit"] = commit if status == 0 else None
    versions["devices"] = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    (run_dir / "versions.json").write_text(json.dumps(versions, indent=2))
    return run_dir


def use_all_cores():
    """Makes an XLA device of every core, since XLA threads one CPU device badly."""
    if jax.config.jax_num_cpu_devices > 0:
        return  # chosen by the user
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores that this process may use
        cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)


def shardings(args):
    """Where a state lies, whole on each device, and a batch, split over a CPU's."""
    devices = jax.devices()
    count = 1
    if devices[0].platform == "cpu":
        counts = range(1, len(devices) + 1)
        count = max(n for n in counts if args.batch_size % n == 0)
    mesh = jax.sharding.Mesh(devices[:count], "batch")
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("batch"))
    return whole, split


def lock(run_dir):
    """Ends this process if another one trains in the folder."""
    file = (run_dir / "args.json").open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: another process trains in {run_dir}") from None
    return file  # the lock is held while this file is open


def main():
    # --- Flags and devices ---
    sys.path.append(os.getcwd())  # where --env-id module:Name-v0 looks too
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")  # faster
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # films without a screen
    np.seterr(over="ignore")  # in float32; require_finite reports it
    jax.config.update("jax_default_matmul_precision", "float32")
    use_all_cores()
    args = parse_args()
    whole, split = shardings(args)
    if args.track:
        import wandb

    # --- Environments and state ---
    film = {"render_mode": "rgb_array"} if args.capture_video else {}
    eval_envs = make_envs(args, args.eval_episodes, **film)
    obs_dim = eval_envs.single_observation_space.shape[0]
    act_dim = eval_envs.single_action_space.shape[0]
    k_init, k_act, k_update, k_eval = jax.random.split(jax.random.key(args.seed), 4)
    state = init_state(args, obs_dim, act_dim, k_init)
    step = 0
    if args.resume or args.evaluate:
        run_dir = Path(args.resume or args.evaluate)
        has_replay = (run_dir / "replay.dat").exists()
        state, step = load(run_dir / "checkpoint.npz", state, whole=has_replay)
    else:
        task = args.env_id.replace("/", "-").replace(":", "-")
        run_dir = make_run_dir(args, f"{task}__{Path(__file__).stem}__{args.seed}")

    # --- Nothing to train ---
    if args.evaluate:
        returns = evaluate(
            args, eval_envs, state, k_eval, run_dir, step, "evaluate.csv"
        )
        print(f"step {step}: return {returns.mean():.1f} +- {returns.std():.1f}")
        print(f"evaluate.csv and films are in {run_dir}")
        return
    if args.resume and not has_replay:
        what = "is complete" if step >= args.total_timesteps else "has no replay"
        print(f"{run_dir} {what}, and cannot be continued; --evaluate plays it")
        return

    # --- Replay ---
    _lock = lock(run_dir)
    mode = "r+" if args.resume else "w+"
    replay = open_replay(args, run_dir / "replay.dat", obs_dim, act_dim, mode)
    state = jax.device_put(state, whole)

    # --- Logging ---
    stopped = f"stopped; continue with --resume {run_dir}"
    signal.signal(signal.SIGINT, lambda *_: sys.exit(stopped))  # Ctrl-C
    if args.track:
        wandb.init(
            project="simpo",
            id=run_dir.name,
            resume="allow",
            config=vars(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(str(run_dir), purge_step=step + 1, flush_secs=10)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
    bar.write(f"run folder {run_dir}, on {split.num_devices} x {jax.devices()[0]}")
    recent = collections.deque(maxlen=20)  # returns of training episodes
    metrics = {}
    first_step = step
    start = time.time()

    # --- Start the episodes; those of a resumed run are new ---
    envs = make_envs(args, args.num_envs)
    rng = np.random.default_rng([args.seed, step])
    obs, _ = envs.reset(seed=int(rng.integers(EVAL_SEED)))
    updates = int(state.step)

    while True:
        # --- Save and evaluate ---
        done = step >= args.total_timesteps
        if done or step % args.eval_every < args.num_envs:
            replay.flush()
            save(run_dir / "checkpoint.npz", state, step)
            returns = evaluate(args, eval_envs, state, k_eval, run_dir, step)
            writer.add_scalar("charts/eval_return", returns.mean(), step)
            training = np.mean(recent or [np.nan])
            bar.write(
                f"step {step}: return {returns.mean():.1f} +- {returns.std():.1f},"
                f" of training episodes {training:.1f}"
            )
        if done:
            break

        # --- Act, and update while the environments step ---
        learning = step >= args.learning_starts
        if learning:
            std = noise_std(args, updates)
            a0 = best_action(args, state, obs, args.act_samples, k_act, step, std)
            batch = jax.device_put(
                sample_batch(replay, step, rng, args.batch_size), split
            )
            with_policy = updates % args.policy_delay == 0
            state, new_metrics = update(args, with_policy, state, batch, k_update)
            metrics |= new_metrics
            updates += 1
            a0 = np.asarray(a0)  # waits for the action, while the update runs
        else:
            a0 = rng.uniform(-1, 1, (args.num_envs, act_dim)).astype(np.float32)

        # --- Step the environments ---
        next_obs, reward, terminated, truncated, infos = envs.step(a0)
        last_obs = next_obs.copy()
        ended = np.flatnonzero(terminated | truncated)
        for i in ended:
            last_obs[i] = infos["final_obs"][i]
        require_finite(step, action=a0, observation=last_obs, reward=reward)
        add_transitions(replay, step, Batch(obs, last_obs, a0, reward, terminated))
        obs = next_obs
        step += args.num_envs
        bar.update(args.num_envs)

        # --- Log episodes, and losses once both kinds of update were made ---
        for i in ended:
            episode = infos["final_info"]["episode"]
            recent.append(episode["r"][i])
            writer.add_scalar("charts/episodic_return", episode["r"][i], step)
            writer.add_scalar("charts/episodic_length", episode["l"][i], step)
        if updates > args.policy_delay and step % LOG_EVERY < args.num_envs:
            metrics = jax.device_get(metrics)
            for name, value in metrics.items():
                writer.add_scalar(f"losses/{name}", value, step)
            require_finite(step, **metrics)
            sps = (step - first_step) / (time.time() - start)
            writer.add_scalar("charts/SPS", sps, step)
            bar.set_postfix(training_return=np.mean(recent or [np.nan]))

    # --- End ---
    writer.close()
    (run_dir / "replay.dat").unlink()  # only a resumed run needs it
    print(f"done: eval.csv, checkpoint.npz and TensorBoard events are in {run_dir}")


if __name__ == "__main__":
    main()
